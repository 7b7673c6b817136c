"""`check`: solutions of the exercise, judged by the facts of `ex2.grading.facts`, sub-task by sub-task."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from ex2.errors import InputError, RunError
from ex2.grading import facts, network_facts
from ex2.grading.verdicts import Fact, NotRight
from ex2.grading.worker import STOPPED, Worker, find_problem, printable

FACTS = {n: f for module in (facts, network_facts) for n, f in vars(module).items() if isinstance(f, Fact)}
GOOD = ("right", "differs", "advice")
COLUMNS = {
    "right": ("right",),
    "differs": ("differs", "advice"),
    "wrong": ("wrong",),
    "fails": ("fails", "hangs"),
    "missing": ("missing",),
}
CSV_COLUMNS = "submission task fact verdict found expected looks_like where".split()
NOT_PREVENTED = """
A submission can still read and write files, start programs that use the network, and end this one.
README has the command for a sandbox."""


def check_submissions(args) -> None:
    """The command `check`.

    Raises:
        InputError: a folder is none, or the only one holds no submission.
        RunError: not all is right.
    """
    if not 0 < args.time_limit < 1e6:
        raise InputError(f"--time_limit must be above 0 and below a million seconds, got {args.time_limit:g}")
    if not 1 <= args.jobs <= 256:
        raise InputError(f"--jobs must lie within 1 .. 256, got {args.jobs}")
    for folder in args.folders:
        if not Path(folder).is_dir():
            raise InputError(f"{folder} is no folder")
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in args.folders))
    single = len(folders) == 1
    if single and find_problem(folders[0]):
        raise InputError(f"{args.folders[0]} holds no submission: {find_problem(folders[0])}")
    rows = judge_all(folders, args)
    if args.json == "-":
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(as_lines(rows) if single else as_table(rows)))
    bad = [row["submission"] for row in rows if row["verdict"] not in GOOD]
    if bad and single:
        raise RunError(f"{len(bad)} of {len(rows)} facts are not right in {args.folders[0]}")
    if bad:
        raise RunError(f"{len(set(bad))} of {len(folders)} submissions are not all right")


def judge_all(folders: Sequence[Path], args) -> list[dict]:
    """The verdict on every fact of every submission, several at a time. The CSV file grows with each submission."""
    names = [folder.name for folder in folders]
    names = [printable(f if names.count(f.name) > 1 else f.name) for f in folders]
    rows: list[dict] = []
    with open_new(args.csv) as table, open_new(args.json) as file, ThreadPoolExecutor(args.jobs) as pool:
        csv.writer(table).writerow(CSV_COLUMNS)
        waiting = [pool.submit(check_submission, folder, args.time_limit) for folder in folders]
        try:
            for done, (name, future) in enumerate(zip(names, waiting), 1):
                verdicts = [{"submission": name, **said} for said in future.result()]
                rows += verdicts
                csv.writer(table).writerows([cell(row[column]) for column in CSV_COLUMNS] for row in verdicts)
                table.flush()
                if len(folders) > 1:
                    counts = ", ".join(f"{number} {column}" for column, number in count(verdicts).items() if number)
                    print(f"{done} of {len(folders)}: {name}: {counts}", file=sys.stderr, flush=True)
        except BaseException:  # Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            STOPPED.set()
            raise
        json.dump(rows, file, indent=2)
    return rows


def check_submission(folder: Path, limit: float) -> list[dict]:
    """The verdict on every fact of a folder; `limit`: CPU seconds for each."""
    with closing(Worker(folder, limit)) as worker:
        return judge(worker, FACTS)


def judge(worker: Worker, names: Sequence[str]) -> list[dict]:
    """The verdict on facts, in the order of the sheet: "right", "advice" or one of `NotRight`."""
    verdicts = []
    for name in sorted(names, key=lambda name: FACTS[name].task):
        fact = FACTS[name]
        said = {"fact": name, "task": fact.task, "statement": fact.statement, "equation": fact.equation}
        said.update(verdict="right", found="", expected="", looks_like="")
        try:
            worker.begin()
            fact.check(worker)
        except NotRight as error:
            said.update(vars(error), verdict="advice" if fact.advice and error.verdict == "wrong" else error.verdict)
        except Exception as error:  # its answer was of another type or shape
            said.update(verdict="fails", found=f"an answer that can't be judged: {type(error).__name__}: {error}")
        said.update(found=printable(said["found"]), where=worker.where, adapted=sorted(worker.adapted))
        verdicts.append(said)
    return verdicts


def open_new(path: str | None):
    """The file, or none for None and "-". Raises InputError: it can't be written."""
    try:
        return open(os.devnull if path in (None, "-") else path, "w", encoding="utf-8", newline="")
    except OSError as error:
        raise InputError(f"can't write {path} ({error.strerror})") from error


def cell(text: str) -> str:
    """Text that a spreadsheet takes for text, and never for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@") else text


def count(verdicts: Sequence[dict]) -> dict[str, int]:
    """How many verdicts fall into each column."""
    return {column: sum(said["verdict"] in kinds for said in verdicts) for column, kinds in COLUMNS.items()}


def as_lines(verdicts: Sequence[dict]) -> Iterator[str]:
    """The table of one submission, a line for each fact. What keeps several facts from being judged is said once."""
    causes = Counter(said["found"] for said in verdicts)
    for said in verdicts:
        equation = f" ({said['equation']})" if said["equation"] else ""
        kind = said["verdict"] if said["verdict"] in (*GOOD, "missing") else said["verdict"].upper()
        yield f"{said['task']:<8} {kind:<8} {said['statement']}{equation}"
        place = f"{said['where']}: " if said["where"] else ""
        if said["expected"]:
            looks_like = f": {said['looks_like']}" if said["looks_like"] else ""
            yield f"{'':18}{place}found {said['found']}, expected {said['expected']}{looks_like}"
        elif causes.get(said["found"]) and said["found"]:
            facts = causes.pop(said["found"])
            yield f"{'':18}{said['found']}" + (f" (so for {facts} facts)" if facts > 1 else "")
    counts = count(verdicts)
    others = f", {counts['differs']} differ from the sheet in what is as good or advice" if counts["differs"] else ""
    yield f"{counts['right']} of {len(verdicts)} facts are right{others}"
    for text in sorted({text for said in verdicts for text in said["adapted"]}):
        yield f"adapted: {text}"


def as_table(rows: Sequence[dict]) -> Iterator[str]:
    """The table of many submissions, a line for each, and what was found in which of them."""
    by_name, causes = {}, {}
    for row in rows:
        by_name.setdefault(row["submission"], []).append(row)
        if row["verdict"] != "right":
            statement = f"{row['statement']}: " if row["expected"] else ""
            cause = f"{row['verdict']:<8} {statement}{row['looks_like'] or row['found']}"
            causes.setdefault(cause, {})[row["submission"]] = None
    width = max(map(len, (*by_name, "submission")))
    yield f"{'submission':<{width}}" + "".join(f"{column:>9}" for column in COLUMNS)
    for name, verdicts in by_name.items():
        yield f"{name:<{width}}" + "".join(f"{number:>9}" for number in count(verdicts).values())
    yield ""
    for cause, names in sorted(causes.items(), key=lambda item: -len(item[1])):
        yield f"{cause}\n{'':9}{len(names)}: {', '.join(names)}"
    yield NOT_PREVENTED
