"""When steps in which a teacher, or nothing, trained end a run."""

from __future__ import annotations

from fire_megatron.train.fruitless import Fruitless


def metrics(rows, kept=None, nonfinite=(), weight=1.0):
    """Of a step: rows of each teacher, how many were kept (all), and how many had scores that are not finite."""
    kept = rows if kept is None else kept
    told = {"fire/dropped/unwanted": float(sum(rows.values()) - sum(kept.values()))}
    if any(kept.values()):
        told |= {"fire/token_weight_min": weight, "fire/token_weight_max": weight}
    for name, count in rows.items():
        told |= {f"teacher/{name}/rows": float(count), f"teacher/{name}/nonfinite": float(dict(nonfinite).get(name, 0))}
        if count:
            told[f"teacher/{name}/keep_ratio"] = kept[name] / count
    return told


def problems(*steps, most=2, ended=False):
    """What is said after each of the steps."""
    counter = Fruitless(most)
    told = []
    for step in steps:
        list(counter.step(step))
        told.append(counter.problem(ended=ended))
    return told


BOTH, NONE = {"math": 2, "code": 2}, {"math": 0, "code": 0}


def test_steps_that_train_are_never_in_vain():
    assert problems(*[metrics(BOTH)] * 9) == [None] * 9
    assert problems(metrics(BOTH), ended=True) == [None]


def test_only_steps_in_a_row_count():
    nothing, good = metrics(BOTH, NONE), metrics(BOTH)
    assert problems(nothing, nothing, good, nothing, nothing) == [None] * 5
    assert problems(nothing, nothing, nothing)[2].startswith("no row trained in 3 steps in a row (optimizer.guard.max_")
    assert problems(nothing, most=0)[0].startswith("no row trained in 1 step in a row")


def test_weights_of_0_train_nothing():
    *_, last = problems(*[metrics(BOTH, weight=0.0)] * 3)
    assert "no row trained" in last and "all weights are 0" in last
    assert problems(*[metrics(BOTH, weight=-1.0)] * 3)[-1] is None


def test_a_step_without_a_teachers_rows_says_nothing_of_it():
    broken = metrics(BOTH, {"math": 0, "code": 2}, {"math": 2})
    absent = metrics({"math": 0, "code": 4})
    told = problems(broken, absent, absent, absent, broken, absent, broken)
    assert told[:6] == [None] * 6
    assert told[6].startswith("teachers.math: none of its rows trained in 3 steps in a row")


def test_few_rows_of_a_rare_label_may_be_dropped_by_chance():
    dropped = metrics({"math": 1, "code": 7}, {"math": 0, "code": 7})
    told = problems(*[dropped] * 8)
    assert told[:7] == [None] * 7 and told[7].startswith("teachers.math: none of its 8 rows trained in 8 steps")
    assert problems(dropped, ended=True) == [None]


def test_a_teacher_most_of_whose_scores_are_not_finite():
    broken = metrics({"math": 3, "code": 2}, {"math": 0, "code": 2}, {"math": 2})
    assert "since log-probabilities or entropies were not finite" in problems(*[broken] * 3)[2]
    mixture = metrics({"code+math": 2, "code": 2}, {"code+math": 0, "code": 2}, {"code+math": 2})
    assert problems(*[mixture] * 3)[2].startswith("teachers.code and teachers.math: none of its rows")
    assert problems(broken, ended=True)[0] is not None
    assert problems(metrics({"math": 3, "code": 2}), broken, ended=True)[1] is None, "it has taught before"


def test_teachers_that_take_turns():
    """Nothing trains, and neither has had rows in so many steps in a row."""
    rows = [{"math": 4, "code": 0}, {"math": 0, "code": 4}] * 2
    told = problems(*[metrics(row, {"math": 0, "code": 0}, row) for row in rows[:3]])
    assert told[:2] == [None] * 2
    assert told[2].startswith("teachers.math and teachers.code: none of its rows trained in 3 steps in a row")


def test_what_is_told_once_of_a_teacher():
    counter, broken = Fruitless(2), metrics(BOTH, nonfinite={"math": 1})
    [told] = counter.step(broken)
    assert told.startswith("WARNING: teachers.math: log-probabilities or entropies of 1 of 2 rows are not finite")
    assert list(counter.step(broken)) == []


def test_a_resumed_run_goes_on_counting():
    first, second = Fruitless(2), Fruitless(2)
    nothing = metrics(BOTH, NONE)
    for _ in range(2):
        list(first.step(nothing))
    second.load(first.state())
    list(second.step(nothing))
    assert second.problem() is not None
    Fruitless(2).load({})
