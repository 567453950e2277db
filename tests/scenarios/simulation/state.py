"""Whether anything is left of what has ended: every place where a request or a credit can be forgotten."""

from __future__ import annotations

from simulation.mesh import Mesh


def faults(mesh: Mesh) -> list[str]:
    """What is not as it should be in a mesh that nobody asks anything of any more; empty when all is home."""
    found = [f"{job.job_id} has no end" for job in mesh.jobs if job.end is None]
    for replica in mesh.replicas:
        ledger = replica.ledger
        state = (replica.busy_count, ledger.running_count, ledger.waiting_count, replica.engine.load().running)
        if any(state):
            found.append(f"{replica.address} holds requests: {state}")
        if ledger.granted_count + ledger.free_count != ledger.slot_count:
            found.append(f"{replica.address} lost slots")
        in_hand = _in_hand(mesh, replica.address)
        if any(scheduler.is_alive for scheduler in mesh.schedulers) and in_hand != ledger.granted_count:
            found.append(f"{replica.address} granted {ledger.granted_count} credits, and {in_hand} are in hand")
    for scheduler in mesh.schedulers:
        if scheduler.waiting_count or len(scheduler.lanes):
            found.append(f"{scheduler.name} has a queue of {len(scheduler.lanes)}")
        if scheduler.lanes.token_count:
            found.append(f"{scheduler.name} counts {scheduler.lanes.token_count} tokens in empty lanes")
        if scheduler.is_alive and (step := scheduler.expectations.brownout.step):
            found.append(f"{scheduler.name} is still at step {step} of the brownout")
        if in_flight := sum(replica.book.in_flight_count for replica in scheduler.table):
            found.append(f"{scheduler.name} believes {in_flight} requests in flight")
    return found


def _in_hand(mesh: Mesh, address: str) -> int:
    books = [scheduler.table.get(address) for scheduler in mesh.schedulers if scheduler.is_alive]
    return sum(known.book.count for known in books if known is not None)
