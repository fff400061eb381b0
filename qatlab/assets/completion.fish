# Completes `qatlab <command> ...` and `python -m qatlab.<command> ...`.
function _qatlab
    set -lx COMP_LINE (commandline -cp)
    set -l words (commandline -opc)
    if string match -qr '(^|/)python[0-9.]*$' -- $words[1]
        $words[1] -m qatlab -sc query=fish 2>/dev/null
    else
        $words[1] -sc query=fish 2>/dev/null
    end
end

complete -c qatlab -f -a '(_qatlab)'
complete -c python -c python3 -n 'string match -qr "^\S+ -m qatlab" -- (commandline -cp)' -f -a '(_qatlab)'
