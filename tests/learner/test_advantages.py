"""Group rewards -> advantages."""

import chex
import numpy as np
import pytest

from jaxgrpo.learner.advantages import group_advantages


def test_std_divides_by_the_sample_deviation_plus_epsilon() -> None:
    # mean 2.5; deviations -1.5, -.5, .5, 1.5; sample variance 5 / 3, its root 1.2909944; divided by 1.2910944
    expected = [[-1.16180503, -0.38726834, 0.38726834, 1.16180503]]
    chex.assert_trees_all_close(
        group_advantages(np.array([[1.0, 2.0, 3.0, 4.0]])),
        np.array(expected, np.float32),
        rtol=1e-6,
    )


def test_two_episodes_of_zero_and_one() -> None:
    # mean .5; sample variance .5, its root .70710678; .5 / .70720678 = .70700678
    chex.assert_trees_all_close(
        group_advantages(np.array([[0.0, 1.0]])),
        np.array([[-0.7070068, 0.7070068]], np.float32),
        rtol=1e-6,
    )


def test_none_only_centres() -> None:
    advantages = group_advantages(np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]), "none")
    chex.assert_trees_all_equal(
        advantages, np.array([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]], np.float32)
    )


def test_groups_do_not_see_each_other() -> None:
    rewards = np.array([[0.0, 1.0, 0.5], [10.0, -4.0, 2.0]])
    chex.assert_trees_all_equal(group_advantages(rewards)[1:], group_advantages(rewards[1:]))


@pytest.mark.parametrize("normalization", ["std", "none"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1 / 3])
def test_equal_rewards_give_exactly_zero(normalization: str, reward: float) -> None:
    advantages = group_advantages(
        np.full((1, 3), reward), normalization
    )  # the mean of three times 0.1 is not 0.1
    chex.assert_trees_all_equal(advantages, np.zeros((1, 3), np.float32))


def test_a_group_of_equal_rewards_beside_another_is_exactly_zero() -> None:
    advantages = group_advantages(np.array([[0.1, 0.1, 0.1], [0.0, 1.0, 0.5]]), "std")
    chex.assert_trees_all_equal(advantages[0], np.zeros(3, np.float32))
    assert advantages[1].tolist() == pytest.approx([-0.9998, 0.9998, 0.0], abs=1e-6)  # .5 / .5001


def test_rewards_that_float32_cannot_tell_apart_have_their_advantages() -> None:
    advantages = group_advantages(
        np.array([[16777216.0, 16777217.0]]), "none"
    )  # 2 ** 24 and one more
    assert advantages.tolist() == [[-0.5, 0.5]]


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 episodes"):
        group_advantages(np.array([[1.0]]))


def test_an_unknown_normalization_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of \('std', 'none'\), got 'mean'"):
        group_advantages(np.array([[1.0, 2.0]]), "mean")
