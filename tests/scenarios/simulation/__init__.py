"""A discrete-event simulator of the mesh: the production's own decisions, with simulated time in place of the network.

Reading order: `simulator.py` (time), `engine.py` (what a request costs), `replica.py` and `scheduler.py` (thin glue
around the production's pure modules), `mesh.py` (all of it together, and the clients), `workload.py` (who asks for
what and when), `figures.py` (what came of it), `scenarios.py` (the questions that are asked).

Nothing here decides about a request: who is admitted, who waits, who goes where and who has a credit is decided by the
modules of `tidegate.scheduler` and `tidegate.model`, imported unchanged.
"""
