import pytest
from tiny import TINY, without_evaluation

import ex2_main


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_shapes):
    """The folder of a tiny conditional run with its checkpoint, without pictures."""
    results = tmp_path_factory.mktemp("results")
    flags = ["--results_dir", str(results), "--class_free_guidance", "--run_name", "cond", "--sampler", "ddim"]
    with pytest.MonkeyPatch.context() as patch:
        without_evaluation(patch)
        assert ex2_main.main([*TINY, "--dim_mults", "1", "2", *flags]) == 0
    return results / "cond"
