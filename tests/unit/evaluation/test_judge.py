"""The judge, by a table of right answers and what a model may write for them."""

import json
import os
import threading
from pathlib import Path

import pytest

from fire_megatron.config.errors import DataError
from fire_megatron.evaluation.answers import last_boxed
from fire_megatron.evaluation.judge import LONGEST, Judge

PAIRS = "FIRE_JUDGE_PAIRS"
MORE = json.loads((Path(__file__).parents[2] / "data" / "judged_answers.json").read_text(encoding="utf-8"))
"""Right answers with writings that say the same, and with answers that do not."""
RIGHT = [
    # the same, written in other ways
    (r"\frac{1}{2}", [r"\dfrac{1}{2}", r"\tfrac12", "1/2", "0.5", ".5"]),
    (r"\frac43", [r"\frac{4}{3}"]),
    (r"\frac 59", [r"\cfrac{5}{9}"]),
    (r"1\frac{4}{5}", [r"\frac{9}{5}"]),
    (r"137 \frac{1}{2}", ["137.5"]),
    ("11\\sqrt2", [r"11\sqrt{2}", "11√2"]),
    (r"\frac{sqrt{7} + 1}{2}", [r"\frac{1+\sqrt{7}}{2}"]),
    ("8", ["2^3"]),
    ("-3", ["−3"]),
    ("70 \\sqrt{2}", [r"70\,\sqrt{2}"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\pi/2)"]),
    ("p - q", ["-q+p"]),
    (r"\cot x", [r"\frac{\cos x}{\sin x}"]),
    ("(a+5)(b+2)", ["ab+2a+5b+10"]),
    ("2^{25} \\cdot 26!", [r"26!\cdot 2^{25}"]),
    (r"\binom{2n}{n}", [r"\frac{(2n)!}{n!\,n!}"]),
    (r"$\frac{1}{2 n+2}$", [r"\frac{1}{2(n+1)}"]),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", [r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}"]),
    # assignments and equations
    ("x=5", ["5"]),
    ("5", ["x = 5"]),
    ("$f(x)=2 x$", ["2x"]),
    ("y = 2x + 3", ["2x - y + 3 = 0"]),
    ("MR=SRMC", ["SRMC=MR"]),
    (r"x^{\prime}+\frac{r}{V} x-r c=0", [r"x' + \frac{r}{V}x - rc = 0"]),
    # numbers
    ("10,\\!080", ["10080", "10,080", "10{,}080"]),
    ("58,500", ["58500"]),
    ("1.6", ["1.60"]),
    (".0000672", [r"6.72 \times 10^{-5}"]),
    ("4.5e33", [r"4.5 \times 10^{33}", r"4.5\cdot10^{33}", r"45 \times 10^{32}", "4.5E+33"]),
    ("1e-8", ["10^{-8}", r"\frac{1}{10^8}"]),
    ("1.325e-27", [r"1.325\times10^{-27}"]),
    ("3e8", ["300000000"]),
    ("-1./3", [r"-\frac{1}{3}"]),
    ("-3./2", ["-1.5"]),
    ("0.333333", [r"\frac{1}{3}"]),
    ("1+\\sqrt{3} i", [r"1 + i\sqrt{3}"]),
    # percent
    ("62.5%", [r"62.5\%", "0.625", "62.5"]),
    ("$8 \\%$", ["8 percent"]),
    # units and currency
    (r"90^\circ", ["90", "90°", r"90^{\circ}", "90 degrees"]),
    (r"\frac{270}7\text{ degrees}", [r"\frac{270}{7}"]),
    (r"864 \mbox{ inches}^2", ["864", r"864\text{ in}^2"]),
    (r"5.4 \text{ cents}", [r"5.4\ \text{cents}"]),
    ("\\$18.90", ["18.90", r"\$18.9"]),
    ("4.5e33", [r"4.5 \times 10^{33}\ \text{erg/s}", r"4.5 \times 10^{33} \, \mathrm{erg} \cdot \mathrm{s}^{-1}"]),
    ("9.6", ["9.6 m", "9.6 cm^2"]),
    # lists in any order, points and sequences in theirs
    ("1,-2", ["-2, 1"]),
    ("1,3,5", [r"\{5, 3, 1\}", "1, 3 and 5", r"1, 3, \text{and } 5"]),
    ("$221,$8$", ["8,221"]),
    ("E_{1},E_{2}", ["E_2, E_1"]),
    (r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}"]),
    (r"\{1\pm\sqrt{5},-2\}", [r"\{-2, 1-\sqrt5, 1+\sqrt5\}"]),
    ("$(1,8,19), (2,7,13), (4,5,7)$", ["(4,5,7),(1,8,19),(2,7,13)"]),
    ("(1e-9, 2)", [r"(10^{-9}, 2)"]),
    ("$f(x)=x$,$f(x)=2-x$", ["f(x)=2-x, f(x)=x"]),
    # intervals and sets
    ("(3,4]", [r"\left(3, 4\right]", r"3 < x \le 4"]),
    (r"x \in [-2,7]", ["[-2,7]"]),
    (r"(-\infty, 2) \cup (3, \infty)", [r"(3,\infty)\cup(-\infty,2)"]),
    ("$(-\\infty, 0) \\cup\\{1\\}$.", [r"\{1\}\cup(-\infty,0)"]),
    (r"$k \geqslant 2$", [r"k \ge 2"]),
    # words
    (r"\text{Evelyn}", ["Evelyn", r"\textbf{evelyn}"]),
    (r"\text{(C)}", ["C", "(C)"]),
    (r"\text{even}", [r"\mathrm{even}"]),
    # bases, as far as they are written
    ("52_8", ["52_{8}", "52"]),
    ("np.arcsin(10/13)", [r"\arcsin\left(\frac{10}{13}\right)"]),
    ("m", [r"\boxed{m}"]),
    # the imaginary unit, however it stands
    (r"-2+2 \sqrt{3} i", [r"-2+2i\sqrt{3}"]),
    (r"-8-8 \sqrt{3} i", [r"-8-8i\sqrt{3}"]),
    (r"\frac{e^{2 i t}}{(2+2 i)}", [r"\frac{e^{2it}}{2+2i}", r"\frac{1-i}{4}e^{2it}"]),
    (r"\frac{4 A}{3+3 i} e^{i t}", [r"\frac{2A(1-i)}{3}e^{it}"]),
    (r"\frac32 i", [r"\frac{3i}{2}", "1.5i"]),
    ("1+2i", [r"1+i\cdot 2", r"1+2\mathrm{i}"]),
    ("-i", [r"\frac1i"]),
    (r"\sum_{i=1}^{n} i", [r"\sum_{i=1}^n i"]),
    ("x=2i", [r"x=i\cdot 2"]),
    (r"\{i,-i\}", [r"\{-i,\frac{-1}{i}\}"]),
    (r"\cos t", [r"\frac{e^{it}+e^{-it}}{2}"]),
    # units outside of text commands
    ("9.6", ["9.6 cm", "9.6cm", "9.6 km/s", "9.6 m/s^2", "9.6 kg m/s", r"9.6\ \mu\text{m}", "9.6 eV", "9.6 K",
        "9.6 km/h", "9.6 square units"]),
    ("30", ["30 mph"]),
    ("75", [r"75\;\Omega", r"75\,\mathrm{k}\Omega"]),
    ("20", [r"20^\circ C"]),
    ("4.5e33", [r"4.5 \times 10^{33}\ \mathrm{erg\ s^{-1}}", r"4.5 \times 10^{33} erg s^{-1}"]),
    # nouns
    ("3", [r"3\text{ apples}", r"3 \text{ ways}", r"3\text{ square units}", r"3\text{ sq. cm}"]),
    ("70", [r"70\text{ ways to choose}"]),
    ("5,7", [r"5\text{ cm}, 7\text{ cm}"]),
    # scales
    ("2000000", [r"2\text{ million}", r"2\text{ million dollars}"]),
    ("5000", ["5 thousand"]),
    # names
    ("(2,3)", ["x=2, y=3", "y=3, x=2"]),
    ("x=2, y=3", ["y=3, x=2"]),
    ("(6,31,-1)", ["A=6, B=31, C=-1"]),
    # further writings
    ("0.2", [r"\approx 0.2", r"x \approx 0.2"]),
    (r"\sqrt{51}", ["51^{0.5}"]),
    (r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}", [r"\frac{-1 \pm\sqrt{17}}{2}"]),
    (r"\frac{-1 \pm\sqrt{17}}{2}", [r"\frac{-1-\sqrt{17}}{2}, \frac{-1+\sqrt{17}}{2}"]),
    ("3,-3", [r"x = \pm 3"]),
    (r"\frac13", [r"0.\overline{3}"]),
    (r"\frac{7}{6}", [r"1.1\overline{6}"]),
    (r"-\frac13", [r"-0.\bar{3}"]),
    (r"\emptyset", [r"\varnothing"]),
    ("12", ["12\\\\", r"12\,", "12\\"]),
    ("10080", [r"10\,080"]),
    (r"(-\infty,2)\cup(3,\infty)", [r"x<2 \text{ or } x>3"]),
    (r"(-\infty,2]\cup(3,5)", [r"x\le2 \text{ or } 3<x<5"]),
]  # fmt: skip
WRONG = [
    ("5", ["6", "-5"]),
    ("27", ["", "   ", "27 or 28"]),
    ("1.6", ["1.61"]),
    ("0.33", [r"\frac{1}{3}"]),
    # numbers that algebra takes for one another
    ("3e8", ["8e3"]),
    ("4.5e33", ["4.5e34"]),
    ("1.325e-27", ["2.88e-19", "0", r"\frac{1}{10^{20}}"]),
    ("2.55e-10", [r"\sqrt{2} \times 10^{-12}"]),
    ("(1e-9, 2)", ["(1e-12, 2)"]),
    ("58,500", ["58, 500, 1"]),
    ("2500,7500", ["2500"]),
    ("7,4", ["7.4"]),
    ("1,2", ["12"]),
    # letters that are variables, not units
    ("$6m$", ["6"]),
    (r"\frac{1}{\sqrt{2}}c", [r"\frac{1}{\sqrt{2}}"]),
    ("2k", ["2"]),
    ("5", ["5x"]),
    ("2", ["2e"]),
    ("5.4 \\text{ cents}", ["54 \\text{ cents}"]),
    # order, brackets, parts
    ("(1,2)", ["(2,1)"]),
    ("(3,4]", ["(3,4)", "[3,4]"]),
    ("(2,2,2),(3,4,3)", ["(2,2,2)"]),
    ("1,3,5", ["1,3"]),
    ("1,3", ["1,3,3"]),
    ("1,1,3", ["1,3,3"]),
    (r"(-\infty, 2) \cup (3, \infty)", [r"(-\infty, 2)"]),
    ("x=5", ["x=6"]),
    ("y = 2x + 3", ["y = 2x - 3"]),
    ("52_8", ["52_9", "42_{10}"]),
    # words
    (r"\text{Evelyn}", ["Angela"]),
    (r"\text{east}", [r"\text{seat}"]),
    (r"\text{odd}", [r"\text{even}"]),
    (r"\text{(C)}", ["D", r"\text{(B) and (C)}"]),
    ("$(-\\infty, 0) \\cup\\{1\\}$.", ["0"]),
    (r"t(0,4]", ["4"]),
    # products, functions and quotients, not units
    ("2", ["2xy", "2ab", "2pq"]),
    ("10", ["10ab^2"]),
    ("1", ["1/N"]),
    ("3", ["3/ab", "3 gcd", "3V", r"3\text{xy}", r"3\mu"]),
    ("5", ["5h", "5L", "5m"]),
    # text that changes the number
    ("4", [r"4\text{ or more}", r"4 \text{ or infinitely many}"]),
    ("8", [r"8\text{ is not possible}"]),
    ("12", [r"12\text{!}"]),
    ("2", [r"2\text{ million}"]),
    ("5", [r"5\text{ thousand}"]),
    ("3", [r"3\text{ dozen}"]),
    ("2x", [r"2x\text{ or less}"]),
    # the imaginary unit
    ("1+2i", ["1-2i"]),
    ("3i", ["3"]),
    ("x=2i", ["x=3i"]),
    (r"\frac{e^{2 i t}}{(2+2 i)}", [r"\frac{1+i}{4}e^{2it}"]),
    # names, brackets, spaces, bases
    ("(2,3)", ["y=2, x=3", "2,3"]),
    ("x=2, y=3", ["x=3, y=2"]),
    ("2,3", ["(2,3)"]),
    ("5", ["[5]", r"5\text{ (mod 7)}"]),
    ("12", ["1 2", r"1\ 2"]),
    ("123", ["1 2 3"]),
    (r"5\text{ or more}", ["5"]),
    ("10", ["10_{2}"]),
    ("3", [r"\pm 3"]),
    ("0.3", [r"0.\overline{3}"]),
    (r"(-\infty,2)\cup(3,\infty)", [r"x\le 2 \text{ or } x>3"]),
    # what is no mathematics
    ("5", [r"\frac{", "}{", r"\\\\", "\0", "\ud800", "五", "🦊" * 20, "$$$$",
        "i think it is five, but i am not sure of it", "(" * 40, r"\frac{1}{" * 100 + "2" + "}" * 100,
        "5" * (LONGEST + 1)]),
    ("2", ["10^{9999}"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def judge():
    with Judge() as judge:
        yield judge


def each(table):
    """Every pair of a table."""
    return [(right, given) for right, answers in table for given in answers]


@pytest.mark.parametrize(("right", "given"), each([*RIGHT, *MORE["right"].items()]))
def test_right(judge, right, given):
    assert judge.equal(right, given)


@pytest.mark.parametrize(("right", "given"), each([*WRONG, *MORE["wrong"].items()]))
def test_wrong(judge, right, given):
    assert not judge.equal(right, given)


RESPONSES = [
    (r"\[\boxed{(1, 2)} \quad\text{or}\quad \boxed{(2, 1)}\]", "(2,1),(1,2)", True),
    (r"$\boxed{-4}$, $\boxed{0}$, and $\boxed{7}$", "0,7,-4", True),
    (r"$x = \boxed{3}$ and $y = \boxed{5}$", "(3,5)", True),
    (r"$x = \boxed{3}$ and $y = \boxed{5}$", "(5,3)", False),
    ("1. \\boxed{3}\n2. \\boxed{5}", "3,5", True),
    (r"At first \boxed{8}; but that is not whole, so \boxed{9}", "9", True),
    (r"At first \boxed{8}; but that is not whole, so \boxed{9}", "8,9", False),
    (r"\boxed{9} \boxed{9}", "9", True),
    (r"\boxed{9}, \boxed{}", "9", False),
    (r"<think> maybe \boxed{4}", "4", False),
    (r"<think> maybe \boxed{4} </think> It is \boxed{6}.", "6", True),
    (r"<think> a </think> \boxed{4} <think> rather \boxed{6}", "4", True),
    ("It is **12**.\n\n**Final Answer:** **12**", "12", True),
    ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", "0.5", True),
    ("so 7 apples remain.\n#### 7", "7", True),
    ("The final answer is not 12.", "12", False),
    ("I get 12 in the end.", "12", False),
]


@pytest.mark.parametrize(("response", "right", "verdict"), RESPONSES)
def test_responses(judge, response, right, verdict):
    assert judge.equal(right, last_boxed(response)) == verdict


@pytest.mark.skipif(PAIRS not in os.environ, reason=f"{PAIRS} names no JSON Lines of gold, response and right")
def test_pairs_of_a_file(judge):
    rows = [json.loads(line) for line in Path(os.environ[PAIRS]).read_text(encoding="utf-8").splitlines()]
    wrong = [row for row in rows if judge.equal(row["gold"], last_boxed(row["response"])) != row["right"]]
    assert rows and not wrong


def test_math_verify_judges_by_its_own_lights(judge):
    assert judge.published_verdict(r"\frac12", r"It is $\boxed{0.5}$.")
    assert judge.published_verdict("5", r"\boxed{x+y=5}") and not judge.equal("5", "x+y=5")
    assert not judge.published_verdict("3", r"\boxed{3 \checkmark}") and judge.equal("3", r"3 \checkmark")
    assert judge.published_verdict("$8$,$4$", "so $4, 8$") and not judge.published_verdict("7", "")


ENDLESS = ["9^{9^{9^9}}", "(" * 400]


def test_endless_answers_are_wrong_and_end_nothing():
    with Judge(seconds=0.5) as judge:
        for count, given in enumerate(ENDLESS, 1):
            assert not judge.equal("2", given)
            assert judge.unjudged == count
        assert not judge.equal("2", ENDLESS[0]) and judge.unjudged == len(ENDLESS), "a verdict is remembered"
        assert judge.equal("x+1", "1+x")


def test_an_endless_answer_costs_its_time_once():
    with Judge(seconds=0.5) as judge:
        answers = [ENDLESS[0], "7", "x+1", "1+x", "8", ENDLESS[0] + " ", "x+2", "7.0"]
        assert judge.classes(answers) == [0, 1, 2, 2, 3, 0, 4, 1]
        assert judge.unjudged <= 1


def test_equal_texts_need_no_judge():
    with Judge() as judge:
        assert judge.classes([r"\frac{x}{2}", r"\dfrac{x}2", r"\tfrac{x}{2}."])[::2] == [0, 0]


def test_a_judge_whose_process_dies_judges_on():
    with Judge() as judge:
        assert judge.equal("x+1", "1+x")
        judge._process.kill()
        judge._process.wait()
        assert not judge.equal("x+2", "2+x") and judge.unjudged == 1
        assert judge.equal("x+3", "3+x")


def test_any_thread_may_judge(judge):
    verdicts = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(judge.equal(f"x+{n}", f"{n}+x"))) for n in range(20, 24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 4


def test_classes(judge):
    answers = [r"\frac12", "0.5", "7", None, "7.0", "", "x", r"\frac{2}{4}"]
    assert judge.classes(answers) == [0, 0, 1, None, 1, None, 2, 0]


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install math-verify"):
        Judge()
