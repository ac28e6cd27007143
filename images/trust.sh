# To be sourced in a build step: trust the certificates of the secret `ca`, when there is one.
if [ -s /run/secrets/ca ]; then
    export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca
fi
