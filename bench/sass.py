"""Counts of instructions by class in machine code of NVIDIA GPUs, as nvdisasm prints it."""

from __future__ import annotations

import re

# (class, pattern of opcodes); the first match counts. Opcodes: CUDA binary utilities.
CLASSES = (
    ("tensor", r"HMMA|HGMMA|UTCHMMA|UTCQMMA|IMMA|DMMA"),
    ("spill", r"LDL|STL"),
    ("global", r"LDG|STG|LDGSTS|UTMALDG|UTMASTG|UBLKCP|ATOMG|RED|REDG|LD|ST"),
    ("shared", r"LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM|LDT|STT|UTCCP"),
    ("double", r"DADD|DMUL|DFMA|DSETP|DMNMX"),
    ("float", r"F(ADD|MUL|FMA|SEL|SET|SETP|MNMX|CHK|SWZADD)[23]?|H(ADD|MUL|FMA|SETP|MNMX)2|MUFU"),
    ("barrier", r"(UCGA)?BAR.*|SYNCS|WARPSYNC|(LDG)?DEPBAR|WARPGROUP|UTCBAR|ARRIVES|CCTL|MEMBAR"),
    ("branch", r"BRA|BRX|EXIT|CALL|RET|JMP|BSSY|BSYNC|BREAK"),
)
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def mix(code: str) -> dict[str, int]:
    """Count a kernel's instructions of each class; "other" is mostly integers and moves."""
    found = {name: 0 for name, _ in CLASSES} | {"other": 0}
    for opcode in _OPCODE.findall(code):
        if opcode != "NOP":
            name = next((n for n, p in CLASSES if re.fullmatch(p, opcode)), "other")
            found[name] += 1
    return {name: count for name, count in found.items() if count}
