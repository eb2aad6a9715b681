"""What the proof compares: flags that are added to one launch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A way to choose what is trained on. flags: added to GRPO's launch; label: in tables and figures."""

    flags: str
    label: str

    @property
    def words(self) -> list[str]:
        """The flags as the words of a command line."""
        return self.flags.split()


def depo(flags: str, label: str) -> Method:
    """Return DEPO with these flags."""
    return Method(f"--advantage_estimator depo {flags}", f"depo, {label}")


WEIGHTED = "--depo.advantage.importance_rescale true"
# The first one is what the others are compared with.
METHODS = {
    "grpo": Method("", "grpo"),
    "dynamic": Method("--algo.dynamic_filtering_enable", "dynamic sampling"),
    "window": depo("", "window .15-.85 (the paper's)"),
    "window-0.15": depo("--depo.filter.epsilon 0.15", "window, rehearsal .15"),
    "utility-0.2": depo("--depo.filter.rule utility --depo.filter.min_utility 0.2", "V >= .2"),
    "utility-0.1": depo("--depo.filter.rule utility --depo.filter.min_utility 0.1", "V >= .1"),
    "rehearsal": depo(
        "--depo.filter.rule utility --depo.filter.min_utility 0.2 --depo.filter.epsilon 0.15", "V >= .2, rehearsal .15"
    ),
    "soft": depo("--depo.filter.rule soft", "soft"),
    "soft-weighted": depo(f"--depo.filter.rule soft {WEIGHTED} --depo.advantage.clip 2", "soft, weighted"),
}
RECOMMENDED = ("window", "rehearsal")  # the presets depo and depo_wide
DEFAULT = ("grpo", "dynamic", "window", "rehearsal", "utility-0.1", "soft")
QUICK = ("grpo", "window")
