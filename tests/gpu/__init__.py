"""The GPU check (`check.py`): needs what hmc needs, neither pytest nor anything else of the tests."""
