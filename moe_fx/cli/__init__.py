"""What the commands of ``moe-fx`` do. The command line itself is in `moe_fx/command_line`, which
starts without importing torch.
"""
