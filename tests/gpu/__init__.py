"""The GPU check (`check.py`): needs what hmc needs, neither pytest nor a file of the tests."""
