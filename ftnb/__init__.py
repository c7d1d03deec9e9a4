__version__ = "0.1.0"

import logging
logging.getLogger('bitsandbytes').setLevel(logging.ERROR) # says on import that a faster CPU kernel could be installed

def __getattr__(name):
    if name!='studio': raise AttributeError(f'module ftnb has no attribute {name!r}')
    from ftnb.panels import studio # the panels only where they are asked for
    return studio
