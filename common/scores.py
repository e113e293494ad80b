"""Returns -> D4RL's normalized score: 0 is a random policy, 100 an expert (not capped at either end)."""

from common.tasks import D4RL

# Episode returns that score 0 and 100, D4RL's, also where they are off: random Hopper returns +19, not -20.
REFERENCE_RETURNS = {family: tuple(returns) for family, returns in D4RL["reference_returns"].items()}
Reference = tuple[float, float] | None  # such returns; None: unknown


def reference_returns(task: str) -> Reference:
    """The returns that score 0 and 100 in a D4RL, bundled, bandit or Gymnasium task; None if unknown."""
    families = [family for family in REFERENCE_RETURNS if task.lower().startswith(f"{family}-")]
    # Gymnasium's v5 environments changed rewards and dynamics: not comparable.
    return REFERENCE_RETURNS[max(families, key=len)] if families and not task.endswith("-v5") else None


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
