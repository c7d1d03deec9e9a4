import os

class NotebookAccessError(Exception): pass
class SecretNotFoundError(Exception): pass
class TimeoutException(Exception): pass

def get(key):
    "The secret of the environment variable STUB_SECRET_<key>, or the error that STUB_SECRETS names"
    if (e := os.environ.get('STUB_SECRETS')): raise globals()[e](key)
    if f'STUB_SECRET_{key}' not in os.environ: raise SecretNotFoundError(key)
    return os.environ[f'STUB_SECRET_{key}']
