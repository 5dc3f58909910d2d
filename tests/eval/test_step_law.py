"""The step law against the paper's check value, against scipy's fit, and on data that obey it."""

import numpy as np
import pytest
import scipy.optimize

from eval.step_law import FEWEST_PROBLEMS, as_arrays, fit, predicted_accuracy, step_law

GSM8K_TEST = {2: 326, 3: 371, 4: 297, 5: 175, 6: 87, 7: 40, 8: 20, 9: 2, 11: 1}


@pytest.mark.parametrize(("accuracy_step", "accuracy"), [(0.789, 0.444), (0.897, 0.680), (0.942, 0.807)])
def test_the_single_step_accuracies_of_table_4_give_the_accuracies_of_the_whole(accuracy_step, accuracy):
    assert predicted_accuracy(accuracy_step, GSM8K_TEST) == pytest.approx(accuracy, abs=0.0005)


def test_the_fit_is_that_of_scipy():
    rng = np.random.default_rng(0)
    steps = np.arange(2, 9)
    for _ in range(20):
        accuracy, weights = rng.random(7), rng.integers(1, 300, 7).astype(float)
        found = scipy.optimize.minimize_scalar(
            lambda a, y=accuracy, w=weights: np.sum(w * (y - a**steps) ** 2),
            bounds=(0, 1),
            method="bounded",
            options={"xatol": 1e-9},
        )
        ours = float(fit(steps, accuracy, weights))
        theirs = np.sum(weights * (accuracy - found.x**steps) ** 2)
        assert np.sum(weights * (accuracy - ours**steps) ** 2) <= theirs + 1e-9


def samples_that_obey(accuracy_step, num_samples, seed):
    rng = np.random.default_rng(seed)
    steps = np.repeat(list(GSM8K_TEST), list(GSM8K_TEST.values()))
    return steps, rng.binomial(num_samples, accuracy_step**steps) / num_samples


def test_it_finds_the_law_that_made_the_data_and_its_interval_holds_it():
    held = 0
    for seed in range(40):
        steps, accuracy = samples_that_obey(0.897, 8, seed)
        law = step_law(steps, accuracy, seed)
        assert law["all"]["accuracy_step"] == pytest.approx(0.897, abs=0.01)
        low, high = law["all"]["ci95"]
        held += low <= 0.897 <= high
    assert held >= 34  # 38 of 40 are expected; fewer than 34 in a thousandth of such tests


def test_points_are_the_numbers_of_steps_that_enough_problems_have():
    law = step_law(*samples_that_obey(0.8, 4, 0))
    assert [point["steps"] for point in law["points"]] == [2, 3, 4, 5, 6, 7, 8]  # 9 and 11 have fewer than five
    assert [point["num_problems"] for point in law["points"]] == [326, 371, 297, 175, 87, 40, 20]
    assert law["first_four"]["points"] == 4 and law["all"]["points"] == 7
    assert all(point["ci95"][0] <= point["value"] <= point["ci95"][1] for point in law["points"])


def test_a_law_that_bends_down_shows_in_the_two_fits():
    """The paper's finding: the first four points promise more than the last three keep."""
    steps, accuracy = samples_that_obey(0.9, 256, 0)
    law = step_law(steps, np.where(steps > 5, 0.7 * accuracy, accuracy))
    assert law["first_four"]["accuracy_step"] > law["all"]["accuracy_step"]
    assert law["first_four"]["ci95"][0] > law["all"]["accuracy_step"]


def test_without_two_points_there_is_no_law():
    assert step_law(np.array([2] * 50 + [3] * (FEWEST_PROBLEMS - 1)), np.zeros(50 + FEWEST_PROBLEMS - 1)) is None
    assert step_law(*as_arrays([None, None], [0.5, 0.5])) is None
