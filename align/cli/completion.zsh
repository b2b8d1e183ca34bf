# Completion of align: eval "$(align completion zsh)". zsh runs bash's script.
(( ${+functions[compdef]} )) || { autoload -Uz compinit && compinit }
autoload -Uz bashcompinit && bashcompinit
@SCRIPT@