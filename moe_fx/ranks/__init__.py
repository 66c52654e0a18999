"""What the ranks of a process group tell each other before anything is exchanged.

`agree` compares what they have compiled, so that they fail together instead of hanging; `waiting`
ends an exchange that waits too long, and says who is missing (`presence`, `device_watch`); `groups`
checks that a group serves a device.
"""
