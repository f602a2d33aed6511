"""Nodes that go with all that is on them: their stages start again elsewhere."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from kv_runs import NEW_TOKENS, PARAMS, answers, prompt, wide_llama
from ray.cluster_utils import Cluster
from ray_engines import ray_engine
from rings import manual_plan

from headrace.runtime.store import Store
from headrace.scheduler.placement import Tier
