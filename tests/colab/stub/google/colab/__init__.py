"Stands in for Colab's own package in the tests: secrets, Drive and the browser's files, kept in folders that the environment names."
from . import drive, files, userdata
