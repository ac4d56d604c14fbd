{{- /* A release may have dots in its name and begin with a digit, a Service may not. */}}
{{- define "emrakul.name" -}}
{{- $release := regexReplaceAll "^([0-9])" (.Release.Name | replace "." "-") "r${1}" }}
{{- if contains "emrakul" $release }}{{ $release }}{{ else }}{{ $release | trunc 47 | trimSuffix "-" }}-emrakul{{ end }}
{{- end }}

{{- /* For objects outside of the release's namespace, where releases of the same name would meet. */}}
{{- define "emrakul.name.outside" -}}
{{ .Release.Namespace }}:{{ include "emrakul.name" . }}
{{- end }}

{{- define "emrakul.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "emrakul.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "emrakul.selector" . }}
{{- end }}

{{- /* Of (list image appVersion). */}}
{{- define "emrakul.image" -}}
{{- $image := index . 0 }}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}{{ else }}{{ $image.repository }}:{{ $image.tag | default (index . 1) }}{{ end }}
{{- end }}

{{- define "emrakul.serviceAccount" -}}
{{- with .Values.serviceAccount }}
{{- if not (or .create .name) }}
{{- fail "serviceAccount.create is false and serviceAccount.name is empty: name the account that the operator runs as. Its rights are bound to that account, so it should not be `default`." }}
{{- end }}
{{- .name | default (include "emrakul.name" $) }}
{{- end }}
{{- end }}

{{- /* Empty: each namespace's own `default`. */}}
{{- define "emrakul.workers.serviceAccount" -}}
{{- with .Values.workers.serviceAccount }}
{{- if .name }}{{ .name }}{{ else if .create }}{{ include "emrakul.name" $ }}-worker{{ end }}
{{- end }}
{{- end }}

{{- /* Namespaces where worker pods are known to run, as a JSON list: the watched ones, or those that may name a run. */}}
{{- define "emrakul.tenants" -}}
{{- .Values.namespaces | default (without (keys .Values.allowedRunPrefixes | sortAlpha) "*") | toJson }}
{{- end }}

{{- /* Of a map of texts, what is not empty, as JSON. */}}
{{- define "emrakul.texts" -}}
{{- $set := dict }}
{{- range $key, $text := . }}{{ if $text }}{{ $_ := set $set $key $text }}{{ end }}{{ end }}
{{- toJson $set }}
{{- end }}
