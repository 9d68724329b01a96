module sandkeeper.dev/localcluster/argocd

go 1.26.3

// For its CustomResourceDefinitions alone: nothing of it is built, so none of what it requires is listed.
require github.com/argoproj/argo-cd/v3 v3.5.7
