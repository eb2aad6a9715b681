"""Put the DEPO call sites into a copy of OpenRLHF, check them, or take them out.

  depo patch                   patch the installed OpenRLHF
  depo patch --source DIR      patch a git checkout or editable install: DIR is the folder that holds openrlhf/
  depo patch --target DIR      write a patched copy DIR/openrlhf; put DIR first on PYTHONPATH to use it
  depo patch --check           show which copies are patched, and which one Python imports from here
  depo patch --revert          put the original files back, byte for byte
  depo patch --unverified --target DIR   try a release that openrlhf-depo does not know, in a copy

Patches that are already in stay in. A copy (--target) gets those that are asked for, and no others. Either all files
change or none. Exit status: 0 if done (--check: if the imported copy has the DEPO patch), 1 if refused (--check: if it
does not have the patch), 2 if the options are wrong.
"""

import argparse
import sys
from pathlib import Path

from depo_plugin.commands.patching import (
    Copy,
    PatchError,
    apply,
    imported_root,
    inspect,
    installed_root,
    is_unverified,
    revert,
    version_of,
    write_copy,
    write_unverified,
)

LAUNCH = "python -m openrlhf.cli.train_ppo_ray"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `depo patch`."""
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder that holds openrlhf/ (default: installed)")
    parser.add_argument("--target", type=Path, metavar="DIR", help="write a patched copy DIR/openrlhf instead")
    parser.add_argument("--cpu", action="store_true", help="also apply the patch that runs OpenRLHF without a GPU")
    parser.add_argument("--no-seam", action="store_true", help="with --cpu: leave the DEPO call sites out")
    parser.add_argument("--unverified", action="store_true", help="with --target: copy a release that is not known")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="change nothing, show which copies are patched")
    what.add_argument("--revert", action="store_true", help="take out every patch (with --target: from that copy)")


def run(args: argparse.Namespace) -> int:
    """Run `depo patch` and return the exit status."""
    if args.no_seam and not args.cpu:
        return _usage("--no-seam leaves nothing to apply. Add --cpu.")
    if args.cpu and (args.check or args.revert):
        return _usage("--check and --revert apply nothing: leave out --cpu and --no-seam.")
    if args.unverified and (not args.target or args.cpu or args.check or args.revert):
        return _usage("--unverified writes a copy with the call sites alone: add --target DIR, leave out the rest.")
    try:
        if args.check:
            return _check([place.resolve() for place in (args.source, args.target) if place])
        if args.revert:
            return _revert(args)
        return _apply(args)
    except PatchError as err:
        print(f"depo patch: {err}", file=sys.stderr)
        return 1


def _apply(args: argparse.Namespace) -> int:
    wanted = ({"cpu"} if args.cpu else set()) | (set() if args.no_seam else {"depo"})
    base = args.source.resolve() if args.source else installed_root()
    if args.unverified:
        return _unverified(base, args.target.resolve())
    if args.target:
        root = args.target.resolve()
        changed = write_copy(base, root, wanted)
    else:
        root = base
        if args.no_seam and "depo" in (inspect(root).applied or ()):
            raise PatchError(f"{root} has the DEPO patch, which --no-seam leaves out. Run first: depo patch --revert")
        changed = apply(root, wanted)
    print(_describe(root) + (f" ({len(changed)} files written)" if changed else " (already there, nothing to do)"))
    if args.target:
        print(f"to use this copy: {_export(root)}")
    else:
        _warn_unless_imported(root)
    return 0


def _unverified(base: Path, target: Path) -> int:
    changed = write_unverified(base, target)
    print(
        f"{_describe(target)} ({len(changed)} files)\n"
        "Each line has its one place, in the right function. Not verified: the files' checksums, which are not known, "
        "and what the hooks rely on in this release (docs/openrlhf.md lists it). Signatures are checked when a launch "
        "starts. Before a long launch run a short one, also with --depo.shadow."
    )
    print(f"to use this copy: {_export(target)}")
    return 0


def _revert(args: argparse.Namespace) -> int:
    root = args.target or args.source
    root = root.resolve() if root else installed_root()
    changed = revert(root)
    print(
        f"{root / 'openrlhf'}: " + (f"{len(changed)} files restored" if changed else "no patch is in, nothing to do")
    )
    return 0


def _check(named: list[Path]) -> int:
    imported, others = imported_root()
    print(f"{LAUNCH} from here, with {sys.executable}, imports:")
    print(f"  {_describe(imported)}" if imported else "  no openrlhf: none is installed or on PYTHONPATH")
    others = [root for root in dict.fromkeys(others + named) if root != imported]
    if others:
        print("other copies:")
    for root in others:
        print(f"  {_describe(root)}")
    if imported and _has_seam(imported):
        return 0
    for root in filter(_has_seam, others):
        _warn_unless_imported(root)
    return 1


def _describe(root: Path) -> str:
    """Return the path, release and patches of a copy, or what is wrong with it."""
    try:
        copy = inspect(root)
    except PatchError as err:
        if is_unverified(root):
            return f"{root / 'openrlhf'}: OpenRLHF {version_of(root)}, UNVERIFIED, patches applied: depo"
        return f"{root / 'openrlhf'}: {err}"
    return f"{root / 'openrlhf'}: OpenRLHF {copy.release}, {_state(copy)}"


def _state(copy: Copy) -> str:
    if copy.applied is None:
        return "PARTLY patched (a run was interrupted): run depo patch again to finish, depo patch --revert to undo"
    return f"patches applied: {', '.join(copy.applied) or 'none'}"


def _has_seam(root: Path) -> bool:
    try:
        return "depo" in (inspect(root).applied or ())
    except PatchError:
        return is_unverified(root)


def _warn_unless_imported(root: Path) -> None:
    """Print a warning if a launch from here would not import the patched copy in `root`."""
    imported, _ = imported_root()
    if imported != root:
        print(
            f"warning: {LAUNCH} from here imports {imported / 'openrlhf' if imported else 'no openrlhf'}, not the "
            f"patched {root / 'openrlhf'}. Put that first: {_export(root)}, "
            "and do not launch from a folder that has its own openrlhf/.",
            file=sys.stderr,
        )


def _export(root: Path) -> str:
    return f'export PYTHONPATH="{root}${{PYTHONPATH:+:$PYTHONPATH}}"'


def _usage(text: str) -> int:
    print(f"depo patch: {text}", file=sys.stderr)
    return 2
