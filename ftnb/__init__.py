__version__ = "0.1.0"

import logging
logging.getLogger('bitsandbytes').setLevel(logging.ERROR) # says on import that a faster CPU kernel could be installed
