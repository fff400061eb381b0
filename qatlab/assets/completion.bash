# Completes `qatlab <command> ...` and `python -m qatlab.<command> ...` in bash and, by its bashcompinit, in zsh.
# Lines of Python that start something else are completed as before, where bash-completion knows them.
if [[ -n ${ZSH_VERSION:-} ]]; then
    autoload -U +X compinit bashcompinit && compinit && bashcompinit
elif [[ -z ${_qatlab_python:-} ]]; then
    { _comp_load python || _completion_loader python; } &> /dev/null
    [[ $(complete -p python 2> /dev/null) =~ -F\ ([^ ]+) ]] && _qatlab_python=${BASH_REMATCH[1]}
fi

_qatlab() {
    local line=${COMP_LINE:0:$COMP_POINT} before="" breaks choice word
    case "${1##*/} ${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
        "qatlab "*) set -- "$1" ;;
        python*" -m qatlab"*) set -- "$1" -m qatlab ;;
        *)
            [[ -n ${_qatlab_python:-} ]] && "$_qatlab_python" "$@"
            return
            ;;
    esac
    # bash replaces what stands after the last of its word breaks: recipe=li is three words to it, and one to zsh.
    word=${line##* } breaks=${COMP_WORDBREAKS//[^=:]/}
    [[ -n $breaks ]] && before=${word%"${word##*[$breaks]}"}
    COMPREPLY=()
    while IFS= read -r choice; do
        [[ $choice == "$word"* ]] && COMPREPLY+=("${choice#"$before"}")
    done < <(COMP_LINE=$line "$@" -sc query=bash 2> /dev/null)
    # A word that is complete, and nothing that an option's value, a further part or a file may follow, ends with a space.
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *[=./] && ${COMPREPLY[0]} != */* ]] && COMPREPLY=("${COMPREPLY[0]} ")
}

complete -o nospace -o default -F _qatlab qatlab python python3
