"""The load generator: plans a load, sends it without waiting for the server, and keeps a ledger of every request.

    flows.py     what a load is made of          plan.py      from a load and a seed to the requests
    running.py   runs a plan, gives the ledger   workers.py   the processes that send
    ledger.py    what became of each request     summary.py   the ledger in figures
    scenarios.py the loads with a name           report/      the ledger as a page with pictures

What plans and judges is pure: no grpc, clock or environment, and randomness comes in as a generator with a seed.
"""
