"""Every shipped engine adds up and reduces gradients in fp32, measured on two ranks.

bf16 has 8 bits: eight gradients added up in it are wrong in the third digit. DeepSpeed does so
unless `data_types.grad_accum_dtype` and `communication_data_type` say fp32, as every file in
ds_configs/ does and training.ds_config adds where one does not.
"""

import json

import pytest

from tests.support.launch import ROOT, run_ranks

# DeepSpeed's kernel for the optimiser in host memory is compiled at first use, for minutes; more
# nodes than one are needed for the other. Both are zero3.json's in everything that counts here.
LEFT_OUT = ("zero3_offload", "zero3_hpz")
FP32 = {"communication_data_type", "data_types"}


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_files_say_it_themselves(path):
    values = json.loads(path.read_text())
    if values.get("bf16", {}).get("enabled"):
        assert values["communication_data_type"] == "fp32"
        assert values["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.faults
def test_accumulated_and_reduced_in_fp32(tmp_path):
    shipped = {path.stem: path for path in (ROOT / "ds_configs").glob("*.json")
               if path.stem not in LEFT_OUT}
    for stage in (1, 2, 3):  # the same engines, as DeepSpeed runs them by default, and ours
        values = json.loads(shipped[f"zero{stage}"].read_text())
        left = {key: value for key, value in values.items() if key not in FP32}
        shipped[f"silent{stage}"] = tmp_path / f"silent{stage}.json"
        shipped[f"silent{stage}"].write_text(json.dumps(left))
        shipped[f"bf16_{stage}"] = tmp_path / f"bf16_{stage}.json"
        shipped[f"bf16_{stage}"].write_text(json.dumps(values | {
            "communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}))
    run_ranks(2, "tests/support/workers/precision_worker.py", str(tmp_path / "found.json"),
             *(f"{name}={path}" for name, path in shipped.items()))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(shipped) >= 10
    for name, error in found.items():
        if name.startswith("bf16_"):
            assert error > 1e-3, name  # what the setting avoids: the measurement can see it
        else:
            assert error < 2e-6, name
