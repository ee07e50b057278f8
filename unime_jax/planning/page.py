"""Prints a plan for people."""

import collections
from collections.abc import Sequence
from typing import Any

from unime_jax.planning.topology import GIB


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Lines columns up: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 1000 * GIB else "more"


def _tera(operations: float) -> str:
    value = operations / 1e12
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _length(days: float) -> str:
    if days >= 2:
        return f"{days:.1f} days"
    if days >= 1 / 12:
        return f"{24 * days:.1f} hours"
    return f"{1440 * days:.0f} minutes" if days >= 1 / 720 else f"{86400 * days:.3g} s"


def _rate(rows: float) -> str:
    return f"{rows:,.0f}" if rows >= 100 else f"{rows:.1f}"


def head(plan: dict[str, Any]) -> str:
    model, batch, mesh = plan["model"], plan["batch"], plan["mesh"]
    base = f", decoder in {model['quantize']}" if model["quantize"] else ""
    published = (
        f" (published sizes: config.model.path={model['config.model.path']} is not there)"
        if model["published_sizes"]
        else ""
    )
    lines = [
        f"Plan of {plan['config']} on {plan['topology']['name']}: {plan['topology']['title']}",
        "",
        f"  model   {model['title']}, {model['dtype']}{base}{published}",
        "  mesh    " + " x ".join(f"{axis} {size}" for axis, size in mesh.items()),
        f"  batch   {batch['rows']} rows, {batch['padded_tokens']:,.0f} positions, "
        f"{batch['padded_share']:.0%} of them padding; {plan['steps']} steps",
        f"          {batch['source']}",
    ]
    for side, groups in batch["groups"].items():
        if groups:
            text = ", ".join(
                f"{rows} of {tokens}" + (f" with {tiles} tile(s)" if tiles else "")
                for rows, tokens, tiles in groups
            )
            lines.append(f"          {side}: {text}")
    lines.append(f"  chunk   {_chunk(plan['chunk'])}, remat {plan['remat']}")
    return "\n".join(lines)


def _chunk(chunk: int) -> str:
    return f"{chunk} rows of the longest group at a time" if chunk else "all rows at once"


def arguments(plan: dict[str, Any]) -> str:
    found = plan["arguments"]
    names = ("base", "adapters", "optimiser", "batch", "total")
    return "\nArguments of a device, GiB (exact)\n" + _table(
        [names, [_gib(found[name]) for name in names]]
    )


def operations(plan: dict[str, Any]) -> str:
    found, devices = plan["flops"], plan["topology"]["devices"]
    parts = [part for part, value in found["needed"].items() if value + found["again"][part] > 0]
    rows = [["", *parts, "sum", "a device"]]
    again = sum(found["again"].values())
    for title, values, total in (
        ("needed", found["needed"], found["model"]),
        ("computed again", found["again"], again),
    ):
        cells = [_tera(values[part]) for part in parts]
        rows.append([title, *cells, _tera(total), _tera(total / devices)])
    share = again / found["model"]
    return (
        "\nOperations of a step, TFLOP (exact; products and convolutions)\n"
        + _table(rows)
        + f"\n  {share:.0%} more than the mathematics needs, to save memory"
    )


def current(plan: dict[str, Any]) -> str:
    found, limit = plan["estimate"], plan["limit"]
    return "\n".join(
        [
            "\nMemory of a device, GiB (temporaries estimated; --compile measures them)",
            f"  {_gib(plan['arguments']['total'])} arguments + about "
            f"{_gib(found['temporaries'])} temporaries = about {_gib(found['peak'])}; "
            + _fits(found["fits"], limit),
            "",
            *_timing(plan, found),
        ]
    )


def _fits(fits: bool, limit: dict[str, Any]) -> str:
    return (
        f"{'fits' if fits else 'DOES NOT FIT'} {_gib(limit['memory'])} with "
        f"{limit['margin_words']} and the next batch kept free ({_gib(limit['bytes'])})"
    )


def _timing(plan: dict[str, Any], found: dict[str, Any]) -> list[str]:
    hardware = plan["topology"]
    codes = ""
    if found["weights_seconds"]:
        codes = f" + {_time(found['weights_seconds'])} to make floats of 4- or 8-bit weights"
    return [
        f"Time, if products run at {plan['mfu']:.0%} of {found['rate'] / 1e12:.0f} "
        "TFLOP/s a device (--mfu) and gathers hide behind them",
        f"  {_time(found['products_seconds'])} of products{codes} = "
        f"{_time(found['seconds'])} a step, {_rate(found['pairs_per_second'])} rows/s, "
        f"{_length(found['days'])} for {plan['steps']} steps",
        f"  peak rate: {hardware['source']}",
    ]


def compiling(plan: dict[str, Any]) -> str:
    return f"\nCompiling for {plan['topology']['title']} ..."


def piece(found, alike, done: int, total: int, seconds: float) -> str:
    """Tells of a piece of a step that is compiled.

    Args:
      found: the piece.
      alike: those that follow from it.
      done, total: pieces to compile.
      seconds: since the first began.
    """
    one = found.compiled
    result = "does not fit" if one.refusal else f"{_gib(one.beside)} GiB of temporaries"
    others = f" (and {len(alike)} more like it)" if alike else ""
    left = max(seconds / done * (total - done), 1.0)
    rest = f"; about {left:.0f} s left" if done < total else ""
    return (
        f"  {done}/{total} {found.piece.describe()}{others}: {result} ({one.seconds:.0f} s{rest})"
    )


def compiled(found: dict[str, Any], plan: dict[str, Any]) -> str:
    limit = plan["limit"]
    title = f"Compiled in {found['seconds']:.0f} s, attention {found['attention']}"
    if found["pieces"]:
        programs = sum(not one["like"] for one in found["pieces"])
        title += f", {programs} programs for {len(found['pieces'])} pieces"
    if found["refusal"]:
        return (
            f"{title}: DOES NOT FIT: the compiler needs {_gib(found['peak'])} GiB\n"
            f"  {found['refusal']}"
        )
    same = "as above" if found["arguments_match"] else "NOT as above: please report this"
    if found["pieces"]:
        same += ", piece by piece"
    if found["idle"]:
        same += f"; {_gib(found['idle'])} of the above are never read, but in the peak"
    lines = [
        f"{title}, GiB of a device",
        f"  arguments {_gib(found['arguments'])} ({same}), temporaries "
        f"{_gib(found['temporaries'])}, peak {_gib(found['peak'])}; " + _fits(found["fits"], limit),
        "",
        *_collectives(found, plan),
    ]
    return "\n".join(lines)


def _collectives(found: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    moved = found["collectives"]
    if not moved:
        return ["Devices send each other nothing"]
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0, ""])
    for one in moved:
        total = kinds[one["kind"]]
        total[0] += one["calls"]
        total[1] += one["bytes"]
        if one["bytes"] > total[2]:
            total[2], total[3] = one["bytes"], one["shape"]
    rows = [["", "calls", "GiB", "largest share"]]
    for kind, (calls, size, most, shape) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        short = shape if len(shape) <= 40 else f"{shape[:37]}..."
        rows.append([kind, f"{calls:,}", f"{size / GIB:,.2f}", f"{short} {most / GIB:,.2f}"])
    note = "" if found["loops_known"] else "; a loop's trip count is unknown: at least these"
    hardware = plan["topology"]
    speed = f"{hardware['device_link'] / 1e9:.0f} GB/s a device"
    if found["network_seconds"]:
        speed += (
            f", between hosts {hardware['device_network'] / 1e9:.0f} GB/s of network for each that "
            f"takes part ({_time(found['network_seconds'])} of it)"
        )
    return [
        f"Collectives of a step, on a device{note}",
        _table(rows),
        f"  {_time(found['collective_seconds'])} if nothing hid them, at {speed}",
    ]


def searching(found: list[dict[str, Any]], limit: dict[str, Any]) -> str:
    return "\n" + _candidates(found) + "\n\nCompiling the fastest that may fit ..."


def tried(found: dict[str, Any]) -> str:
    verdict = "fits" if found["fits"] else "does not fit"
    return (
        f"  chunk {found['chunk']}, remat {found['remat']}: peak {_gib(found['peak'])} GiB, "
        f"{verdict} ({found['seconds']:.0f} s)"
    )


_SHOWN = 12


def _candidates(found: list[dict[str, Any]]) -> str:
    rows = [["chunk, remat", "PFLOP", "seconds", "peak, GiB", ""]]
    fitting = [one for one in found if one["fits"]]
    shown = [*fitting[:_SHOWN], *[one for one in found if not one["fits"]][:3]]
    for one in shown:
        rows.append(
            [
                f"{one['chunk'] or 'all rows'}, {one['remat']}",
                f"{one['flops'] / 1e15:.2f}",
                f"{one['seconds']:.1f}",
                f"{one['peak'] / GIB:.1f}",
                "fits" if one["fits"] else "too large",
            ]
        )
    return f"Settings by estimated time ({len(found)} compared)\n" + _table(rows)


def search(plan: dict[str, Any]) -> str:
    found, compiles = plan["recommended"], plan["search_compiles"]
    lines = [] if compiles else ["\n" + _candidates(plan["search"])]
    basis = "compiled" if compiles else "on estimates alone; --compile checks it"
    if found is None:
        if compiles:
            count = len(plan["tried"])
            basis = (
                f"none of the {count} compiled, the smallest among them"
                if count
                else "the arguments alone are too large: none was compiled"
            )
        return "\n".join(
            [
                *lines,
                f"\nNothing fits ({basis}): take more devices or memory, a smaller base "
                "(config.train.quantize=nf4) or shorter rows",
            ]
        )
    if found.get("compiled"):
        lines += ["", compiled(found["compiled"], plan)]
    here = (plan["chunk"], plan["remat"]) == (found["chunk"], found["remat"])
    flags = f"--config.train.chunk={found['chunk']} --config.model.remat={found['remat']}"
    lines += [
        f"\nRecommended ({basis}): {'the configuration as it is' if here else flags}",
        *_timing(plan, found)[1:2],
    ]
    return "\n".join(lines)
