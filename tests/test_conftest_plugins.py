"""The test set-up itself: typed imports, seeds, proof tiers and the ledger of skips, each shown to catch its fault."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping._import_hook import _JaxtypingFinder

from attnlab.papers.evidence import Proof, load, merge
from plugins.skips import LEDGER, read_ledger
from plugins.tiers import EVIDENCE
from plugins.typecheck import at_boundary, hooked_modules

SOURCE = Path(__file__).parents[1] / "src" / "attnlab"
PLUGINS = ("-p", "plugins.tiers", "-p", "plugins.skips", "-p", "no:randomly", "-p", "no:cacheprovider")
ENTRY = '[[skip]]\ntest = "{}"\nreason = "needs a GPU"\nuntil = "CI has one"\n'


@pytest.fixture
def project(pytester, monkeypatch):
    """An empty project laid out like this one, in which tests are run with the plugins."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pytester.makeini("[pytest]\ntestpaths = tests\nmarkers = slow\n")
    (pytester.path / "src/attnlab/papers").mkdir(parents=True)
    (pytester.path / "tests").mkdir()
    return pytester


def write_tests(project, text: str, name: str = "test_it.py") -> None:
    path = project.path / "tests" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("import pytest\n" + text)


def claim(project, **tiers: list[str]) -> None:
    rows = {tier: {"passed": 1, "failed": 0, "tests": tests} for tier, tests in tiers.items()}
    (project.path / EVIDENCE).write_text(json.dumps({"mixer:a": rows}))


def run(project, *args: str) -> tuple[int, str]:
    result = project.runpytest_inprocess(*PLUGINS, *args)
    return int(result.ret), result.stdout.str() + result.stderr.str()


def tiers_written(project) -> dict[str, dict[str, Proof]]:
    return load(project.path / EVIDENCE)


PASSING = '@pytest.mark.tier("T2", "mixer:a", "mixer:b")\n@pytest.mark.parametrize("n", [1, 2])\ndef test_one(n): assert n\n'
SKIPPING_MODULE = 'pytest.importorskip("no_such_module")\ndef test_one(): assert 1\n'


class TestEvidence:
    def test_writes_what_passed(self, project):
        text = '@pytest.mark.tier("T1", "mixer:a")\ndef test_laws(record_property): record_property("checks", 24)\n'
        write_tests(project, PASSING + text)
        code, _ = run(project, "--write-evidence")
        both = Proof(2, 0, ("tests/test_it.py::test_one",))
        assert code == 0
        assert tiers_written(project) == {
            "mixer:a": {"T1": Proof(24, 0, ("tests/test_it.py::test_laws",)), "T2": both},
            "mixer:b": {"T2": both},
        }

    def test_an_expected_failure_is_written_as_a_failure(self, project):
        write_tests(project, PASSING + '@pytest.mark.xfail\n@pytest.mark.tier("T2", "mixer:a")\ndef test_two(): assert 0\n')
        (project.path / LEDGER).write_text(ENTRY.format("tests/test_it.py"))
        code, _ = run(project, "--write-evidence")
        assert code == 0
        assert not tiers_written(project)["mixer:a"]["T2"].holds
        assert tiers_written(project)["mixer:b"]["T2"].holds

    def test_a_failed_run_writes_nothing(self, project):
        write_tests(project, PASSING + "def test_bad(): assert 0\n")
        code, output = run(project, "--write-evidence")
        assert code == 1
        assert "the run failed" in output
        assert not (project.path / EVIDENCE).exists()

    def test_a_claim_that_no_test_establishes_fails_a_whole_run(self, project):
        write_tests(project, PASSING)
        claim(project, T2=["tests/test_it.py::test_one"], T3=["tests/test_it.py::test_gone"])
        code, output = run(project)
        assert code == 1
        assert "T3 of mixer:a, by tests/test_it.py::test_gone" in output
        assert "T2 of mixer:a" not in output
        assert "2 passed, 1 error" in output

    def test_a_skipped_test_establishes_nothing(self, project):
        write_tests(project, '@pytest.mark.skip(reason="no")\n' + PASSING)
        (project.path / LEDGER).write_text(ENTRY.format("tests/test_it.py::test_one"))
        claim(project, T2=["tests/test_it.py::test_one"])
        code, output = run(project)
        assert code == 1
        assert "T2 of mixer:a" in output

    @pytest.mark.parametrize("args", [("tests/test_it.py",), ("-m", "not slow"), ("--ignore=tests/test_slow.py",)])
    def test_a_claim_outside_the_run_is_not_judged(self, project, args):
        write_tests(project, PASSING)
        write_tests(
            project, '@pytest.mark.slow\n@pytest.mark.tier("T5", "mixer:a")\ndef test_learns(): assert 0\n', "test_slow.py"
        )
        claim(project, T5=["tests/test_slow.py::test_learns"])
        code, output = run(project, *args)
        assert code == 0, output
        assert f"2 tiers established here are not in {EVIDENCE}" in output

    def test_writing_keeps_what_the_run_could_not_judge_and_drops_what_it_refuted(self, project):
        write_tests(project, PASSING)
        write_tests(
            project, '@pytest.mark.slow\n@pytest.mark.tier("T5", "mixer:a")\ndef test_learns(): assert 0\n', "test_slow.py"
        )
        claim(project, T3=["tests/test_it.py::test_gone"], T5=["tests/test_slow.py::test_learns"])
        code, _ = run(project, "--write-evidence", "-m", "not slow")
        assert code == 0
        assert set(tiers_written(project)["mixer:a"]) == {"T2", "T5"}

    @pytest.mark.parametrize("marker", ['"T9", "mixer:a"', '"T1"', '"T1", "agent"', ""])
    def test_a_malformed_marker_is_refused(self, project, marker):
        write_tests(project, f"@pytest.mark.tier({marker})\ndef test_one(): assert 1\n")
        code, output = run(project)
        assert code == pytest.ExitCode.USAGE_ERROR
        assert "tests/test_it.py::test_one: tier marker: expected" in output


class TestSkips:
    SKIP = '@pytest.mark.parametrize("n", [1])\n@pytest.mark.skipif(True, reason="no GPU here")\ndef test_gpu(n): assert 0\n'

    def test_a_skip_without_an_entry_fails_the_run(self, project):
        write_tests(project, self.SKIP)
        code, output = run(project)
        assert code == 1
        assert "tests/test_it.py::test_gpu[1] skipped without an entry here: no GPU here" in output
        assert "1 skipped, 1 error" in output

    def test_an_expected_failure_without_an_entry_fails_the_run(self, project):
        write_tests(project, '@pytest.mark.xfail(reason="not yet")\ndef test_bad(): assert 0\n')
        code, output = run(project)
        assert code == 1
        assert "test_bad skipped without an entry here" in output

    @pytest.mark.parametrize("test", ["tests/test_it.py", "tests/test_it.py::test_gpu", "tests/test_it.py::test_gpu[1]"])
    def test_an_entry_for_file_function_or_case_accounts_for_a_skip(self, project, test):
        write_tests(project, self.SKIP)
        (project.path / LEDGER).write_text(ENTRY.format(test))
        assert run(project)[0] == 0

    def test_a_module_that_skips_itself_needs_an_entry(self, project):
        write_tests(project, SKIPPING_MODULE, "test_other.py")
        code, output = run(project)
        assert code == 1
        assert "tests/test_other.py skipped without an entry here: could not import 'no_such_module'" in output

    @pytest.mark.parametrize(("args", "code"), [((), 1), (("tests/test_it.py",), 0), (("--ignore=tests/test_gone.py",), 0)])
    def test_an_entry_for_no_test_fails_a_whole_run(self, project, args, code):
        write_tests(project, "def test_one(): assert 1\n")
        (project.path / LEDGER).write_text(ENTRY.format("tests/test_gone.py::test_gone"))
        got, output = run(project, *args)
        assert got == code
        assert ("the entry tests/test_gone.py::test_gone names no test" in output) == bool(code)

    def test_an_entry_without_an_exit_condition_fails_the_run(self, project):
        write_tests(project, self.SKIP)
        (project.path / LEDGER).write_text('[[skip]]\ntest = "tests/test_it.py"\nreason = "r"\nuntil = " "\n')
        code, output = run(project)
        assert code == 1
        assert "expected the keys ['reason', 'test', 'until']" in output

    def test_this_repository_s_ledger_is_well_formed(self):
        assert isinstance(read_ledger((SOURCE.parents[1] / LEDGER).read_text(encoding="utf-8")), list)


def test_workers_of_xdist_tell_the_controller_what_only_they_saw(project):
    write_tests(project, PASSING + '@pytest.mark.slow\n@pytest.mark.tier("T5", "mixer:a")\ndef test_learns(): assert 0\n')
    write_tests(project, SKIPPING_MODULE, "test_other.py")
    claim(project, T2=["tests/test_it.py::test_one"], T3=["tests/test_it.py::test_gone"], T5=["tests/test_it.py::test_learns"])
    result = project.runpytest_subprocess(*PLUGINS, "-n", "1", "-m", "not slow")
    output = result.stdout.str()
    assert result.ret == 1
    assert "T3 of mixer:a" in output
    assert "T2 of mixer:a" not in output
    assert "T5 of mixer:a" not in output
    assert "tests/test_other.py skipped without an entry here" in output
    assert "2 passed, 1 skipped, 2 errors" in output


class TestTypedImports:
    @staticmethod
    def modules() -> dict[str, bool]:
        """Every module of the library, and whether it is a package."""
        found = {}
        for path in SOURCE.rglob("*.py"):
            parts = path.relative_to(SOURCE.parent).with_suffix("").parts
            package = parts[-1] == "__init__"
            found[".".join(parts[:-1] if package else parts)] = package
        return found

    def test_the_boundary_is_left_out_and_every_other_file_is_checked(self):
        finder = _JaxtypingFinder(hooked_modules(SOURCE), None, None)
        for module, package in self.modules().items():
            if at_boundary(module, package=package):
                assert not finder.should_instrument(module), module
            elif not package:
                assert finder.should_instrument(module), module

    def test_backends_of_an_op_are_checked_but_not_its_front(self, tmp_path):
        for file in (
            "__init__.py",
            "core/__init__.py",
            "core/contract.py",
            "core/state.py",
            "ops/__init__.py",
            "ops/backends.py",
        ):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        for file in ("ops/delta/__init__.py", "ops/delta/eager.py", "papers/__init__.py", "papers/catalog.py"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        wanted = ["attnlab.core.state", "attnlab.ops.backends", "attnlab.ops.delta.eager", "attnlab.papers"]
        assert hooked_modules(tmp_path) == wanted

    def test_the_hook_is_on_unless_switched_off(self):
        with pytest.raises(AttributeError if os.environ.get("ATTNLAB_TYPECHECK") == "0" else TypeError):
            merge(None, {})  # type: ignore[arg-type]


class TestSetUp:
    DRAWN: list[tuple[float, ...]] = []

    @pytest.mark.parametrize("turn", [0, 1])
    def test_every_test_draws_the_same_numbers(self, turn):
        self.DRAWN.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        assert len(set(self.DRAWN)) == 1

    def test_threads_and_spinning_are_bounded(self):
        assert "GOMP_SPINCOUNT" in os.environ
        assert torch.get_num_threads() == (1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

    def test_warnings_are_errors(self):
        import warnings

        with pytest.raises(UserWarning):
            warnings.warn("anything", UserWarning, stacklevel=1)

    def test_plugins_are_found_in_this_folder(self):
        assert Path(sys.modules["plugins"].__file__ or "").parent == Path(__file__).parent / "plugins"
