# Completion of align, by bash or in zsh. Everything is in here; Tab starts no program.
# Every line of the table: the command, what it takes, and the values of that where they are known.
_align_table='@TABLE@'

# Names of runs, of their checkpoints once a run is named, and `last`.
_align_targets() {
  local record name
  printf '%s\n' last
  for record in runs/*/run.json; do
    [[ -f $record ]] || continue
    name=${record#runs/}
    printf '%s\n' "${name%/run.json}"
    [[ $1 == "${name%run.json}"* ]] || continue
    for record in "runs/${name%run.json}"*/checkpoint.json; do
      name=${record#runs/}
      [[ -f $record ]] && printf '%s\n' "${name%/checkpoint.json}"
    done
  done
}

_align() {
  local place word current rest before='' found='' command key values file
  local words=()
  for ((place = 0; place <= COMP_CWORD; place++)); do  # bash cuts words at =: they are put together again
    word=${COMP_WORDS[place]}
    if ((place > 1)) && [[ $word == '='* || ${COMP_WORDS[place - 1]} == '=' ]]; then
      words[${#words[@]} - 1]+=$word
    else
      words+=("$word")
    fi
  done
  current=${words[${#words[@]} - 1]}
  command=${words[1]}
  [[ $command == data && ${#words[@]} -gt 3 ]] && command="data:${words[2]}"
  ((${#words[@]} == 2)) && command=align
  while read -r word key values; do
    [[ $word == "$command" ]] || continue
    case $key in
      RECIPE) command=RECIPE ;;  # the lines of recipes stand last
      TARGET) [[ $current == *=* ]] || found+=$(_align_targets "$current" | sed 's/$/ /')$'\n' ;;
      *)
        if [[ $current == *=* ]]; then
          [[ $key == "${current%%=*}=" ]] || continue
          for word in $values; do found+="$key$word "$'\n'; done
        else
          rest=${key#"$current"}
          [[ $key == "$current"* && $rest == *.*= ]] && key=$current${rest%%.*}.  # as far as the next dot
          [[ $key == *[.=] ]] || key+=' '
          found+=$key$'\n'
        fi ;;
    esac
  done <<< "$_align_table"
  if [[ ${#words[@]} -gt 2 && ( $current != *=* || -z $found ) && $current != -* ]]; then
    rest=${current#*=}
    for file in "${rest/#\~/$HOME}"*; do  # files, also as the value of an option
      [[ -e $file ]] || continue
      [[ -d $file ]] && file+=/ || file+=' '
      [[ $current == *=* ]] && file=${current%%=*}=$file
      found+=$file$'\n'
    done
  fi
  [[ -z ${ZSH_VERSION-} && $current == *=* && ${COMP_WORDBREAKS-=} == *=* ]] && before=${current%%=*}=
  COMPREPLY=()
  while IFS= read -r word; do
    [[ -n $word && $word == "$current"* ]] && COMPREPLY+=("${word#"$before"}")
  done < <(printf '%s' "$found" | sort -u)
}
complete -o nospace -F _align align
