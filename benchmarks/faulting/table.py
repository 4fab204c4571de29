"""The report: what was tried, and what happened."""

from collections import Counter

from .stops import LATE


def table(found, kinds, skipped):
    """Print a line a kind, what was met below it, and everything that was wrong."""
    print(f"{'fault':26} {'tried':>6} {'wrong':>6}  what happened")
    for kind in kinds:
        of_kind = [one for one in found if one["kind"] == kind]
        if kind in skipped:
            print(f"{kind:26} {'':6} {'':6}  left out: {skipped[kind]}")
        if not of_kind:
            continue
        tried = sum(one["kills"] for one in of_kind) if kind.startswith("kill") else len(of_kind)
        wrong = sum(bool(one["wrong"]) for one in of_kind)
        after = Counter(one["after"] for one in of_kind if one["after"])
        print(f"{kind:26} {tried:6} {wrong:6}  {'; '.join(f'{name} {count}' for name, count in after.most_common())}")
        met = Counter(what for one in of_kind for what in one["met"])
        for what, count in sorted(met.items(), key=lambda item: (-item[1], item[0])):
            print(f"{'':40}  {count:5} {what}")
    for one in found:
        for fault in one["wrong"]:
            print(f"WRONG {one['kind']} {one['number']} (seed {one['seed']}): {fault}")


def kills_of(kind, met):
    return sum(LATE not in one for one in met) if kind.startswith("kill") else 0
