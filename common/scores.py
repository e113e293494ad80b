"""Returns -> D4RL's normalized score: 0 is a random policy, 100 an expert (not capped at either end)."""

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


def reference_returns(task):
    """The returns that score 0 and 100 in a D4RL, bundled, bandit or Gymnasium task; None if unknown."""
    if task.endswith("-v5"):  # Gymnasium's v5 environments changed rewards and dynamics: not comparable
        return None
    families = [family for family in REFERENCE_RETURNS if task.lower().startswith(f"{family}-")]
    return REFERENCE_RETURNS[max(families, key=len)] if families else None


def normalized_score(returns, reference):
    """Score of a return (or array of returns), given the pair of returns that score 0 and 100."""
    zero, hundred = reference
    return 100 * (returns - zero) / (hundred - zero)
