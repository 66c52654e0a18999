"""A sharded transformers model written whole, a block of experts at a time.

Contract. Every rank calls `save`; rank 0 writes what ``save_pretrained`` of the whole model would:
safetensors under the names that checkpoints have, an index, configurations. No rank holds more than
its own shards, and rank 0 some experts' rows of one table beside them, and their converted copy.

Pseudo-code::

    rank 0 saves all but the experts, by transformers' own save_pretrained, into a folder apart
    which tensors the experts are in a checkpoint: transformers' conversion, of tables without data
    for each table, for each rank: its rows -> rank 0, converted, to their places in the files
    rank 0 moves everything into the target, the index last

Until the index is there, a checkpoint that was in the target before is whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_fx.blocks import block_of, most_experts
from moe_fx.compat import resolve_group
from moe_fx.weights.expert_parameters import Slot, slots
from moe_fx.weights.safetensors_file import DTYPES, Writer, names_in

__all__ = ["Unfit", "plan", "save"]

_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\w+)?(-\d{5}-of-\d{5})?\.safetensors")
_PIECE = 8 << 20
"""Bytes that rank 0 takes at a time, about; at least an expert's."""


class Unfit(Exception):
    """The model cannot be written so; says why."""


@dataclass(frozen=True)
class _Table:
    """A parameter of experts, and the tensors that a checkpoint has of it, in order, on meta.

    apart: each is of one expert, of so many kinds; else each has a row an expert.
    """

    slot: Slot
    tensors: Mapping[str, Tensor]
    apart: bool


_Block = tuple[_Table, int, Tensor]
"""Some experts' rows of a table, and the first of them."""


def plan(model: Any, original: bool) -> list[_Table]:
    """The same on every rank. original: names and layouts are those of checkpoints, not of the
    model. Raises `Unfit`."""
    found, seen = [], set()
    for slot in slots(model):
        if slot.unshard is not None and id(slot.tensor) not in seen:
            seen.add(id(slot.tensor))
            found.append(_table(model, slot, original))
    others = [n for n, value in model.state_dict().items() if isinstance(value, DTensor)]
    if len(others) != len([s for s in slots(model) if s.unshard is not None]):
        raise Unfit("other parameters than experts are sharded")
    return found


def _table(model: Any, slot: Slot, original: bool) -> _Table:
    table: Any = slot.tensor
    shape, dtype = tuple(table.shape), table.dtype
    if dtype not in DTYPES:
        raise Unfit(f"{slot.full_name} is {dtype}")
    assert slot.unshard is not None
    experts = shape[0]
    here = most_experts(experts, slot.unshard.group_size)
    whole = _converted(model, slot, torch.empty(shape, dtype=dtype, device="meta"), original)
    part_shape = (here, *shape[1:])
    part = _converted(model, slot, torch.empty(part_shape, dtype=dtype, device="meta"), original)
    if whole.keys() == part.keys():
        rows = [each.shape[0] for each in whole.values() if each.dim()]
        if rows != [experts] * len(whole):
            raise Unfit(f"{slot.full_name} has no row an expert in a checkpoint")
        return _Table(slot, whole, apart=False)
    names, of_part = list(whole), list(part)
    kinds, rest = divmod(len(names), experts)
    firsts = [names[kind * experts + at] for kind in range(kinds) for at in range(here)]
    if rest or firsts != of_part:
        raise Unfit(f"{slot.full_name} is in a checkpoint in another order than that of experts")
    return _Table(slot, whole, apart=True)


def _converted(model: Any, slot: Slot, rows: Tensor, original: bool) -> dict[str, Tensor]:
    name = slot.full_name.replace("_orig_mod.", "")
    if not original:
        return {name: rows}
    from transformers.core_model_loading import revert_weight_conversion

    try:
        made: dict[str, Tensor] = revert_weight_conversion(model, {name: rows})
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise Unfit(f"{slot.full_name} cannot be converted by itself: {error}") from error
    return made


def save(
    model: Any,
    tables: Sequence[_Table],
    original: bool,
    target: Path | None,
    max_shard_size: int | str,
    rest: Callable[[Path, dict[str, Tensor]], Any],
) -> None:
    """tables: of `plan`. target: None where this rank writes nothing. max_shard_size: of a file.
    rest: saves all but the experts into a folder, as transformers does."""
    blocks = _blocks(tables)
    try:
        if dist.get_rank() == 0 and target is not None:
            _write(model, tables, original, target, max_shard_size, rest, blocks)
    finally:
        for _ in blocks:  # the other ranks wait until theirs are taken, whatever has failed here
            pass


def _write(
    model: Any,
    tables: Sequence[_Table],
    original: bool,
    target: Path,
    max_shard_size: int | str,
    rest: Callable[[Path, dict[str, Tensor]], Any],
    blocks: Iterable[_Block],
) -> None:
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        dense = {
            name.replace("_orig_mod.", ""): value
            for name, value in model.state_dict().items()
            if not isinstance(value, DTensor)
        }
        rest(folder, dense)
        files = names_in(folder)
        files |= _write_experts(model, tables, original, folder, max_shard_size, blocks)
        _publish(folder, target, files, model.num_parameters())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_experts(
    model: Any,
    tables: Sequence[_Table],
    original: bool,
    folder: Path,
    max_shard_size: int | str,
    blocks: Iterable[_Block],
) -> dict[str, list[str]]:
    """By file, the tensors in it."""
    from huggingface_hub import split_torch_state_dict_into_shards

    every = {name: each for table in tables for name, each in table.tensors.items()}
    split = split_torch_state_dict_into_shards(
        every, filename_pattern="experts{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with ExitStack() as stack:
        writers: dict[str, Writer] = {}
        for file, names in split.filename_to_tensors.items():
            writer = Writer(folder / file, {name: every[name] for name in names})
            stack.callback(writer.close)
            writers |= dict.fromkeys(names, writer)
        for table, first, rows in blocks:
            _write_block(table, first, _converted(model, table.slot, rows, original), writers)
            del rows  # not held while the next ones arrive
    return {file: list(names) for file, names in split.filename_to_tensors.items()}


def _write_block(
    table: _Table, first: int, made: dict[str, Tensor], writers: Mapping[str, Writer]
) -> None:
    if not table.apart:
        for name, value in made.items():
            writers[name].write(name, value, first)
        return
    names, experts = list(table.tensors), table.slot.tensor.shape[0]
    here = len(made) * experts // len(names)
    for at, value in enumerate(made.values()):
        kind, expert = divmod(at, here)
        name = names[kind * experts + first + expert]
        writers[name].write(name, value)


def _blocks(tables: Sequence[_Table]) -> Iterator[_Block]:
    """On rank 0 each rank's rows of each table, some experts at a time, with the first of them; the
    others send theirs."""
    for table in tables:
        shard: Any = table.slot.tensor
        assert table.slot.unshard is not None
        group = resolve_group(table.slot.unshard.group_name)
        ranks = dist.get_process_group_ranks(group)
        own = shard.detach().to_local().contiguous()
        if 0 not in ranks:  # they have copies
            continue
        experts, *sizes = shard.shape
        count = max(1, _PIECE // max(1, math.prod(sizes) * own.itemsize))
        for at, owner in enumerate(ranks):
            its = block_of(at, experts, len(ranks))
            for first in range(its.start, its.stop, count):
                here = min(count, its.stop - first)
                rows = own[first - its.start :][:here] if owner == dist.get_rank() else None
                if dist.get_rank() == 0:
                    if rows is None:
                        rows = own.new_empty((here, *sizes))
                        dist.recv(rows, owner, group)
                    yield table, first, rows.cpu()
                    del rows
                elif rows is not None:
                    dist.send(rows, 0, group)


def _publish(folder: Path, target: Path, files: dict[str, list[str]], parameters: int) -> None:
    """What is in ``folder``, into ``target``; the index is what makes it the checkpoint."""
    before = {each.name for each in target.glob("*.safetensors") if _WEIGHTS.fullmatch(each.name)}
    count = len(files)
    for stem in ("model", f"model-{folder.name[-8:]}"):
        final = {
            file: f"{stem}-{at:05}-of-{count:05}.safetensors"
            for at, file in enumerate(sorted(files), 1)
        }
        if before.isdisjoint(final.values()):
            break
    size = sum((folder / file).stat().st_size for file in files)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": {name: final[file] for file, names in files.items() for name in names},
    }
    for file, name in final.items():
        os.replace(folder / file, target / name)
    for each in folder.iterdir():
        if each.name != _INDEX:
            os.replace(each, target / each.name)
    written = folder / _INDEX
    written.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    os.replace(written, target / _INDEX)
    for name in before - set(final.values()):
        (target / name).unlink()
