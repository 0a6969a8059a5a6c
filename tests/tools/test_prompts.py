"""tools/sample.py: reading prompts."""

import pytest

from common.settings import ConfigError
from tools.sample import read_prompts


def test_prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"video_caption": "v", "audio_caption": "a"}\n\n'
                    '{"id": "x", "video_caption": "w", "audio_caption": "b", "split": "test"}\n')
    assert [prompt.name for prompt in read_prompts(path, None, None)] == ["prompt000", "x"]
    assert [prompt.video_caption for prompt in read_prompts(path, "test", None)] == ["w"]
    with pytest.raises(ConfigError, match="no prompt of split 'none'"):
        read_prompts(path, "none", None)
    path.write_text('{"video_caption": "v"}\n')
    with pytest.raises(ConfigError, match=":1: key 'audio_caption' is missing"):
        read_prompts(path, None, None)
