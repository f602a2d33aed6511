"""Speculation from the front door: the same answers in fewer passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace import LLM, SamplingParams
from headrace.cluster.cli.main import main
from headrace.cluster.cli.options import parse_speculation
from headrace.scheduler.errors import HeadraceError

ROOM: dict[str, Any] = {"device": "cpu", "host_memory": 0, "context": 256}
SENSELESS = [
    "fda ddabgefbcggbagbgfba eedbecgfa aacbbcfdcddc e gecfdfddafa",
    "a aceedaccg eagcceb bdceefedfdggccfbfdebfcdddfcfacfaead aeag",
]
"""Greedily answered in circles."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=1)
DRAWN = SamplingParams(temperature=0.3, top_p=0.9, max_tokens=30, frequency_penalty=0.1, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_here")
def test_answers_are_the_same_in_fewer_passes(stories: Path) -> None:
    with LLM(stories, device_memory="60MiB", resident_layers=12, **ROOM) as llm:
        assert llm.plan.drafts.most == 0, "nothing streams"
        want = [output.outputs[0] for output in llm.generate(SENSELESS, GREEDY)]
        passes = llm.stats.passes
        drawn = [output.outputs[0].text for output in llm.generate(SENSELESS, DRAWN)]
        assert llm.stats.drafts.tokens_a_pass == 1.0 and not llm.stats.drafts.drafts
    streamed: dict[str, Any] = {
        "stages": 2,
        "placement": "cyclic",
        "device_memory": "8MiB",
        "resident_layers": 3,
    }
    with LLM(stories, ngram_speculation="8", **(ROOM | streamed)) as llm:
        found = [output.outputs[0] for output in llm.generate(SENSELESS, GREEDY)]
        assert llm.stats.passes < 0.7 * passes
        assert llm.stats.drafts.tokens_a_pass > 1.5 and llm.stats.drafts.acceptance > 0.5
        for one, other in zip(found, want, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs is not None and other.logprobs is not None
            for a, b in zip(one.logprobs, other.logprobs, strict=True):
                assert (a.token, a.logprob) == (b.token, pytest.approx(b.logprob, abs=1e-4))
        assert [o.outputs[0].text for o in llm.generate(SENSELESS, DRAWN)] == drawn
        # Stop strings in the midst of what one pass brought.
        accepted = llm.stats.drafts.accepted
        for cut in (45, 46):
            text = llm.get_tokenizer().decode(want[0].token_ids[:cut])
            word = text[-7:]
            stopped = replace(GREEDY, stop=(word,))
            [answer] = llm.generate(SENSELESS[0], stopped)[0].outputs
            assert answer.text == want[0].text[: want[0].text.index(word)]
            assert answer.finish_reason == "stop"
            assert answer.logprobs is not None
            assert [sample.token for sample in answer.logprobs] == answer.token_ids
            assert answer.token_ids == want[0].token_ids[: len(answer.token_ids)]
        assert llm.stats.drafts.accepted > accepted


def test_what_can_be_asked_for(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [parse_speculation(text) for text in ("auto", "off", "5", 0, None)] == [
        None,
        0,
        5,
        0,
        None,
    ]
    for wrong in ("on", "33", "-1", ""):
        with pytest.raises(
            HeadraceError, match="--ngram-speculation must be auto, off or how many"
        ):
            parse_speculation(wrong)
    command = ["plan", str(stories), "--device", "cpu", "--device-memory", "60MiB"]
    for options, told in (
        (["--resident-layers", "12"], False),
        (["--ngram-speculation", "6"], True),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, *options])
        assert ended.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("up to 6 guessed tokens a sequence" in said) == told
