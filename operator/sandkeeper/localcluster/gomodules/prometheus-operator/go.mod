module sandkeeper.dev/localcluster/prometheus-operator

go 1.26.0

// For its CustomResourceDefinitions alone: nothing of it is built, so none of what it requires is listed.
require github.com/prometheus-operator/prometheus-operator v0.85.0
