"""What a start finds of the ones before it: a torn last line, and steps beyond its own."""

import pytest

from training.metrics.writer import MetricWriter, read_records

STEPS = (0, 3, 6)


@pytest.mark.parametrize("first_step", [None, 4], ids=["validate_only", "resumed"])
@pytest.mark.parametrize("torn", ["", '{"step": 3, "train/lo', '{"step": 3}', "\0" * 9])
def test_a_record_behind_a_torn_line_is_not_lost(tmp_path, first_step, torn):
    path, whole = tmp_path / "metrics.jsonl", '{"step": 2, "train/loss": 1.0}\n'
    path.write_text(whole + torn)  # a power cut in the middle of a write
    assert read_records(tmp_path)[0] == {"step": 2, "train/loss": 1.0}
    writer = MetricWriter(tmp_path, first_step)
    writer.validation(4, {"validation/loss_video": 2.0, "validation/stderr_video": 0.5})
    writer.events.close()
    records = read_records(tmp_path)
    mended = [3] if torn == '{"step": 3}' else []  # it lacks its end alone
    assert [record["step"] for record in records] == [2, *mended, 4]
    assert records[-1]["validation/loss_video"] == 2.0


def write_future(run_dir) -> set[str]:
    """Validation rows and samples of STEPS, with what others put beside them; all paths."""
    for step in STEPS:
        path = run_dir / "validation" / f"step{step:08d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        for name in ("", "_ema", "_sampled", ".bak"):
            folder = run_dir / "samples" / f"step{step:08d}{name}"
            folder.mkdir(parents=True)
            (folder / "00_a.mp4").touch()
    (run_dir / "samples" / "validation").mkdir()
    return paths(run_dir)


def paths(run_dir) -> set[str]:
    return {f"{folder}/{path.name}" for folder in ("validation", "samples")
            for path in (run_dir / folder).iterdir()}


@pytest.mark.parametrize(("first_step", "gone"), [(None, ()), (7, ()), (4, (6,)), (0, STEPS)])
def test_what_was_measured_and_drawn_behind_the_step_of_a_resume_goes(tmp_path, first_step, gone):
    """As the lines of metrics.jsonl do, and nothing that training did not make."""
    before = write_future(tmp_path)
    MetricWriter(tmp_path, first_step).events.close()
    assert before - paths(tmp_path) == {
        name for step in gone for name in (f"validation/step{step:08d}.jsonl",
                                           f"samples/step{step:08d}")}


def test_samples_that_cannot_be_deleted_stop_no_run(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step00000006").symlink_to(tmp_path / "elsewhere")  # rmtree refuses
    MetricWriter(tmp_path, 4).events.close()
    assert (tmp_path / "elsewhere").is_dir()
    assert f"{tmp_path}/samples/step00000006 is of an abandoned" in capsys.readouterr().err
