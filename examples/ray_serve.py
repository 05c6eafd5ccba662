"""Replicas on several machines, as many as are needed: pip install 'gemmart[ray]', then serve run ray_serve:app"""

import gemmart.ray

app = gemmart.ray.app(
    "gemma-2-2b-it",  # fetched on each machine, or a path that all of them have
    threads=8,
    replicas=(1, 4),
    parallel=4,
    server={"allowed_hosts": ["*"]},  # a proxy in front checks names and keys; or "api_keys"
)
