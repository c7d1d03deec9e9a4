from .quality import find_secret
def policy(rec, secrets, private, where):
    r=find_secret(rec); return (rec, r, {})
