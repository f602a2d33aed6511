"""What every plan promises about itself."""

from headrace.scheduler.experts import num_experts, transit_slots
from headrace.scheduler.inputs import Budget, ModelShape
from headrace.scheduler.memory import KV_RING_SLOTS, lendable_slots, slot_bytes
from headrace.scheduler.placement import Plan, Tier


def check(plan: Plan, shape: ModelShape, budgets: list[Budget]) -> None:
    """Everything that a plan promises about itself."""
    placement = plan.placement
    assert placement.num_layers == shape.num_layers
    assert placement.num_stages == len(budgets)
    held = shape.held_bytes(split=bool(plan.expert_slots))
    for stage, (memory, budget) in enumerate(zip(plan.memory, budgets, strict=True)):
        layers = placement.layers_of(stage)

        def size(tier: Tier, layers: tuple[int, ...] = layers) -> int:
            return sum(held[i] for i in layers if placement.tiers[i] is tier)

        assert memory.device <= budget.device_memory
        assert memory.host <= budget.host_memory
        assert memory.resident == size(Tier.DEVICE)
        assert memory.host_layers == size(Tier.HOST) == plan.host_bytes_a_pass[stage]
        assert size(Tier.NVME) == plan.nvme_bytes_a_pass[stage]
        assert memory.kv == plan.num_pages * sum(shape.layer_kv_bytes[i] for i in layers)
        tails = sum(shape.layer_tail_bytes[i] for i in layers) if shape.layer_tail_bytes else 0
        assert memory.tails == plan.num_tails * tails
        largest = max(shape.layer_kv_bytes[i] for i in layers)
        assert memory.kv_ring == KV_RING_SLOTS * plan.kv_ring_pages * largest
        slot = slot_bytes(sum(shape.layer_kv_bytes[i] for i in layers))
        assert memory.host_kv == plan.host_pages * slot
        assert memory.host_kv + memory.host_window <= budget.kv_host_memory
        assert bool(memory.host_window) == bool(plan.window_pages)
        window_slot = sum(slot_bytes(shape.layer_kv_bytes[i]) for i in layers)
        assert plan.window_pages * window_slot + plan.nvme_pages * slot <= budget.kv_disk
        assert plan.window_pages * window_slot <= budget.kv_disk // 2
        assert memory.host_layers + memory.host_experts <= budget.host_weights
        assert memory.ring == plan.ring_slots[stage] * plan.slot_bytes
        assert memory.head == (shape.head_bytes if stage == placement.last_stage else 0)
        assert memory.embed == (shape.embed_bytes if stage == placement.first_stage else 0)
        streamed = placement.streamed(stage)
        widest = max(len(placement.visits[v].layers) for v in placement.visits_of(stage))
        assert (plan.ring_slots[stage] >= 2 * widest) if streamed else not plan.ring_slots[stage]
        assert all(held[i] <= plan.slot_bytes for i in streamed)
    if plan.expert_slots:
        check_experts(plan, shape)
    else:
        assert plan.expert_slot_bytes == 0 and plan.host_experts == ()
        assert plan.prediction.experts is None
        assert not any(memory.experts + memory.host_experts for memory in plan.memory)
    assert plan.micro_batches * plan.micro_batch_tokens >= plan.token_budget >= plan.micro_batches
    assert 1 <= plan.max_sequences <= plan.token_budget
    prediction = plan.prediction
    check_guests(plan)
    assert prediction.pass_seconds == prediction.terms[prediction.bound_by]
    assert prediction.pass_seconds == max(prediction.terms.values()) > 0
    assert prediction.tokens_per_second == prediction.sequences / prediction.pass_seconds
    assert prediction.sequences <= plan.max_sequences * plan.passes_in_flight
    assert plan.kv_format == shape.kv_format
    assert bool(plan.num_tails) == bool(shape.layer_tail_bytes)
    assert not plan.num_tails or prediction.sequences <= plan.num_tails
    assert plan.ahead == (prediction.pass_seconds < 1.0)


def check_guests(plan: Plan) -> None:
    """Sequences whose pages lie in host memory have slots there, and room in a ring."""
    prediction = plan.prediction
    assert bool(prediction.guests) == bool(plan.kv_ring_pages) == bool(plan.cold_micro_batches)
    in_host = prediction.cold_pages - prediction.sunk_pages
    assert in_host <= lendable_slots(plan.host_pages) and prediction.sunk_pages <= plan.window_pages
    assert bool(plan.window_pages) == bool(prediction.sunk_pages) >= bool(plan.hot_window)
    assert 0 <= prediction.sunk_seconds <= prediction.terms["nvme"]
    assert 0 <= prediction.guests < prediction.sequences
    assert 0 <= prediction.cold_seconds <= prediction.terms["pcie"]
    a_pass = -(-prediction.cold_pages // plan.passes_in_flight)
    assert a_pass <= plan.cold_micro_batches * plan.kv_ring_pages


def check_experts(plan: Plan, shape: ModelShape) -> None:
    """What a plan of split layers promises besides: slots for those on their way, none too many."""
    assert plan.expert_slot_bytes == shape.expert_bytes
    for stage, memory in enumerate(plan.memory):
        slots, host = plan.expert_slots[stage], plan.host_experts[stage]
        total = num_experts(shape, plan.placement.layers_of(stage))
        transit = transit_slots(shape, plan.placement.visits, stage, plan.micro_batches)
        assert transit <= slots <= total and host <= total
        assert memory.experts == slots * plan.expert_slot_bytes
        assert memory.host_experts == host * plan.expert_slot_bytes
    traffic = plan.prediction.experts
    assert traffic is not None
    assert 0 <= traffic.loaded <= traffic.reached
    nbytes = traffic.nvme_bytes + traffic.host_bytes
    assert nbytes <= traffic.loaded * plan.expert_slot_bytes * (1 + 1e-9)
