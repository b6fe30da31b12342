"""Benchmarks: one module per question, one JSON object out. `pfed bench` runs them; `contract` says what they give."""

from __future__ import annotations

BENCHMARKS = {
    "audit": "What an attack on published prompts says about epsilon, from below",
    "dp-step": "A step with differential privacy, by either mechanism, against one without",
    "experts": "Whose experts to borrow, how many, in which form, against the gate alone",
    "federation": "pFedMoAP against its baselines on photographs, 10 to 20 clients",
    "load": "A thousand clients over mutual TLS against one server: calls, rounds, memory, a server that is killed",
    "matching": "Matching on encrypted and noised sketches: cost, bytes and recall, beside TenSEAL's dot and CKKS",
    "operations": "Random faults in virtual time and random messages: whether the server stays right",
    "precision": "bfloat16 against float32: accuracy of federations, time of a step",
    "privacy-utility": "What epsilon costs in accuracy, by mechanism, matching and shots, beside other ways",
    "secagg": "Secure aggregation: what it costs a client and the server, beside Flower's SecAgg+ and CKKS",
    "simulation": "How long a simulation of 100 clients takes, and where the time goes",
    "training": "A local epoch against the published way and the floor: time, memory, losses",
    "views": "Stored views of each image against fresh crops at every step: accuracy and time",
}
"""Every benchmark by name, with the question that it answers. Kept here so that a list is instant."""


def module_of(name: str) -> str:
    """The module of a benchmark: its name with underscores."""
    return f"{__name__}.{name.replace('-', '_')}"
