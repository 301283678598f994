"""Ways to break the compiled forward pass of sm_90 that the executor has to notice: as a fault, or as wrong numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

Change = Callable[[str], str]
EXP = r"(ex2\.approx\.ftz\.f32\s+%r\d+, )"
NOTHING = "mov.u32 %nothing, %tid.x;"


def nth(text: str, pattern: str, which: int, new: str) -> str:
    """The match of this number, replaced."""
    match = list(re.finditer(pattern, text, re.S))[which]
    return text[: match.start()] + match.expand(new) + text[match.end() :]


def in_loop(change: Change) -> Change:
    """Changes a round of the loop over the hidden dimension alone: from the wait for its operands to its first
    branch."""

    def changed(text: str) -> str:
        product = text.index("wgmma.mma_async")
        start, end = text.rindex("cp.async.wait_group", 0, product), text.index("bra ", product)
        return text[:start] + change(text[start:end]) + text[end:]

    return changed


def behind_loop(change: Change) -> Change:
    """Changes what stands between that branch and the wait for the last products: the mask of the columns."""

    def changed(text: str) -> str:
        start = text.index("bra ", text.index("wgmma.mma_async"))
        end = start + re.search(r"wgmma\.wait_group\.sync\.aligned\s+0;", text[start:]).start()  # type: ignore[union-attr]
        return text[:start] + change(text[start:end]) + text[end:]

    return changed


def replaced(pattern: str, new: str, which: int = 0) -> Change:
    return lambda text: nth(text, pattern, which, new)


FORWARD: dict[str, Change] = {
    "no barrier after the copies were waited for": in_loop(replaced(r"bar\.sync\s+0;", NOTHING)),
    "no barrier after the products were waited for": in_loop(replaced(r"bar\.sync\s+0;", NOTHING, 1)),
    "copies waited for too late": in_loop(replaced(r"(cp\.async\.wait_group\s+)2;", r"\g<1>4;")),
    "products waited for too late": in_loop(replaced(r"(wgmma\.wait_group\.sync\.aligned\s+)1;", r"\g<1>2;")),
    "a wrong step of an operand's descriptor": replaced(r"(add\.s32\s+%r\d+, %r\d+, )6;", r"\g<1>4;"),
    "rows clamped to the largest instead": replaced(r"min\.s32", "max.s32", 1),
    "an exponential of its neighbour's logit": replaced(rf"{EXP}(%r\d+);(\s*){EXP}%r\d+;", r"\1\2;\3\4\2;", 3),
    "a store without its mask": replaced(r"@%p\d+ (st\.global\.b32)", r"\1"),
    "a load without its mask": replaced(r"@%p\d+ (ld\.global\.b64)", r"\1"),
    "no barrier within the reduction over warps": replaced(r"bar\.sync\s+0;", NOTHING, -2),
    "a group of copies not closed": in_loop(replaced(r"cp\.async\.commit_group;", "")),
    "a group of products not closed": in_loop(replaced(r"wgmma\.commit_group\.sync\.aligned;", "")),
    "operands of a product swapped": in_loop(replaced(r"\}, (%rd\d+), (%rd\d+), ", r"}, \2, \1, ", 1)),
    "one column more than there are": behind_loop(lambda text: text.replace("setp.lt.s32", "setp.le.s32")),
}


COMBINE: dict[str, Change] = {
    "one round too few of a loop": replaced(r"(setp\.lt\.s32\s+%p\d+, %r\d+, )%r\d+(;\s*@%p\d+ bra)", r"\g<1>128\2"),
}


KL: dict[str, Change] = {
    "one head's slope for both": replaced(r"kl_kernel_param_32\]", "kl_kernel_param_29]"),
    "products waited for too late": replaced(r"(wgmma\.wait_group\.sync\.aligned\s+)0;", r"\g<1>1;"),
    "no barrier within the reduction over warps": replaced(r"bar\.sync\s+0;", NOTHING, -2),
}


def mutants(
    kernels: Sequence[str] = ("forward_kernel", "combine_kernel"),
) -> Iterator[tuple[str, Callable[[str, str], str]]]:
    """(name, what `executing` takes as `change`). A change that finds nothing to change raises."""
    for kernel in kernels:
        changes = {"forward_kernel": FORWARD, "combine_kernel": COMBINE, "kl_kernel": KL}[kernel]
        for name, change in changes.items():

            def changed(of: str, text: str, kernel: str = kernel, change: Change = change) -> str:
                if of != kernel:
                    return text
                found = change(text)
                assert found != text
                return found

            yield name, changed
