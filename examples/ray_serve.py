"""A model as a Ray Serve application, and a question to it: a store made by `headrace convert`, two stages."""

import argparse

import openai
from ray import serve

from headrace.cluster.serving.ray_serve import build_app

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("store", nargs="?", default=".demo/stories-9m.nf4")
parser.add_argument("--port", type=int, default=8000)
arguments = parser.parse_args()

serve.start(http_options={"port": arguments.port})
ring = {"stages": 2, "device": "cpu", "device_memory": "8MiB", "host_memory": 0, "context": 128}
serve.run(build_app({"store": arguments.store, "model_name": "stories", **ring}))

client = openai.OpenAI(base_url=f"http://127.0.0.1:{arguments.port}/v1", api_key="any")
stream = client.completions.create(
    model="stories", prompt="Once upon a time", max_tokens=60, seed=1, stream=True
)
for chunk in stream:
    print(chunk.choices[0].text, end="", flush=True)
print()
serve.shutdown()
