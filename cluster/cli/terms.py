"""What the terms of a prediction are called in front of people."""

TERMS = {
    "nvme": "reading from NVMe",
    "pcie": "copying from host RAM",
    "compute": "arithmetic",
    "hbm": "device memory traffic",
    "hops": "hops between stages",
}
