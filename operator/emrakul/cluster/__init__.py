"""The operator: what `emrakul run` and `emrakul watch` do on one machine, done in a Kubernetes cluster.

`handlers` knows kopf and nothing else; `kube` is the only API client; `cycle` and `policy` bring one object to where
its run's log says it is; `supervisor` calls them. No truth lives here: everything is found again after a restart.
"""
