"""Under TRITON_INTERPRET=1, which `test_triton.py` sets, Triton's interpreter is repaired first."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.repair()
