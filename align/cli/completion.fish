# Completion of align: align completion fish | source. bash, which has to be there, runs its own script.
set -g _align_script '@SCRIPT@
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_WORDBREAKS=" "
_align
((${#COMPREPLY[@]})) && printf "%s\\n" "${COMPREPLY[@]% }"'

function _align_offered
    set -l current (commandline -ct)
    bash --noprofile --norc -c $_align_script bash (commandline -opc) "$current"
end
complete -c align -f -a '(_align_offered)'
