"""Rows of a Ray Data dataset through rings: a processor for `ray.data.llm.build_processor`.

A processor's actors drive a ring each. Batches that are in flight share its passes, so that none
waits for the longest row of another.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import ray
from pydantic import Field
from ray.data.llm import Processor, ProcessorConfig, build_processor
from ray.llm._internal.batch.processor import ProcessorBuilder
from ray.llm._internal.batch.stages.base import StatefulStage, StatefulStageUDF
from ray.llm._internal.batch.stages.common import maybe_convert_ndarray_to_list
