{{- define "qlora-operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains .Chart.Name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Of objects without a namespace: releases of the same name in two namespaces must not share them. */}}
{{- define "qlora-operator.clusterName" -}}
{{ include "qlora-operator.fullname" . }}.{{ .Release.Namespace }}
{{- end }}

{{- define "qlora-operator.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "qlora-operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "qlora-operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "qlora-operator.serviceAccountName" -}}
{{ .Values.serviceAccount.name | default (ternary (include "qlora-operator.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{/* Of an image's repository, tag and digest; the list's second item is the tag that counts when none is set. */}}
{{- define "qlora-operator.image" -}}
{{- $image := index . 0 }}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default (index . 1) }}
{{- end }}
{{- end }}

{{/* operator/qlora_operator/settings.py. As JSON, since Helm's numbers lose their digits in YAML. */}}
{{- define "qlora-operator.settings" -}}
{{- $own := dict
  "namespaceSelector" (dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace))
  "podSelector" (dict "matchLabels" (include "qlora-operator.selector" . | fromYaml)) }}
trainerImage: {{ include "qlora-operator.image" (list .Values.jobs.image .Chart.AppVersion) | toJson }}
{{- /* Helm drops keys that are set to null, but here null is a value. */}}
{{- range $key := list "runAsUser" "runAsGroup" "fsGroup" }}
{{ $key }}: {{ index $.Values.jobs $key | toJson }}
{{- end }}
{{- range $key, $value := merge (omit .Values.jobs "image" "runAsUser" "runAsGroup" "fsGroup") .Values.timing }}
{{ $key }}: {{ toJson $value }}
{{- end }}
scrapers: {{ concat (list $own) (.Values.metrics.scrapers | default list) | toJson }}
{{- end }}

{{- define "qlora-operator.podSecurityContext" -}}
runAsNonRoot: true
{{- if not (kindIs "invalid" .Values.runAsUser) }}
runAsUser: {{ toJson .Values.runAsUser }}
{{- end }}
{{- if not (kindIs "invalid" .Values.runAsGroup) }}
runAsGroup: {{ toJson .Values.runAsGroup }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "qlora-operator.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Of the pod of `helm test`, which must not be taken for the operator's. */}}
{{- define "qlora-operator.testLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
