"""Returns -> D4RL's normalized score: 0 is a random policy, 100 an expert (not capped at either end)."""

Reference = tuple[float, float] | None  # the returns that score 0 and 100; None: unknown

# Undiscounted episode returns that score 0 and 100, shared by all datasets and versions of an environment.
# From D4RL's infos.py, and kept where they are off: a random policy in Hopper returns +19, not -20.
REFERENCE_RETURNS = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
    "kitchen": (0.0, 4.0),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "bandit": (0.0, 1.0),
}


def reference_returns(task: str) -> Reference:
    """The returns that score 0 and 100 in a D4RL, bundled, bandit or Gymnasium task; None if unknown."""
    if task.endswith("-v5"):  # Gymnasium's v5 environments changed rewards and dynamics: not comparable
        return None
    families = [family for family in REFERENCE_RETURNS if task.lower().startswith(f"{family}-")]
    return REFERENCE_RETURNS[max(families, key=len)] if families else None


def normalized_score(returns, reference):
    """Score of a return (or array of returns), given the pair of returns that score 0 and 100."""
    zero, hundred = reference
    return 100 * (returns - zero) / (hundred - zero)


def scored(episode_return: float | None, reference: Reference) -> dict:
    """A return beside its normalized score, which is None where the task has no reference returns."""
    score = None if None in (episode_return, reference) else normalized_score(episode_return, reference)
    return {"return": episode_return, "score": score}


def show(result: dict) -> str:
    """The score where there is one, else the return, as text."""
    if result["score"] is not None:
        return f"score {result['score']:.1f}"
    return "unknown" if result["return"] is None else f"return {result['return']:.5g}"


def summarize(evaluations: list[dict], reference: Reference) -> dict[str, dict]:
    """The final evaluation, the best one (OMS) and the mean of the last ten (RAT); {} if there is none."""
    means = [evaluation["return_mean"] for evaluation in evaluations]
    if not means:
        return {}
    values = {"final": means[-1], "best": max(means), "last_ten": sum(means[-10:]) / len(means[-10:])}
    return {name: scored(value, reference) for name, value in values.items()}
