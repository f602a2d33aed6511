"""Generate from Python: a store made by `headrace convert`, two stages, eight MiB each."""

import sys

from headrace import LLM, SamplingParams

store = sys.argv[1] if len(sys.argv) > 1 else ".demo/stories-9m.nf4"
params = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=80, seed=1)

with LLM(store, stages=2, device="cpu", device_memory="8MiB", host_memory=0, context=128) as llm:
    for output in llm.generate(
        ["Once upon a time, a small robot", "The old lighthouse keeper"], params
    ):
        print(f"{output.prompt} ...{output.outputs[0].text}\n")
