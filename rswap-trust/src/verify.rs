//! Checks certificates of peers: the chain and the times as rustls does, then role and name.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use crate::{identity::Identity, rule::Rule};

/// Who was found at the other end, or why it is not taken: more than an alert can say.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found(Arc<Mutex<Option<Result<Identity, String>>>>);

impl Found {
    pub(crate) fn get(&self) -> Option<Result<Identity, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, found: Result<Identity, String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
    }

    /// To be called when the chain has been checked: before that, a certificate says nothing.
    fn judge(&self, certificate: &CertificateDer<'_>, rule: &Rule) -> Result<(), Error> {
        let judged = Identity::of_certificate(certificate)
            .map_err(|error| error.to_string())
            .and_then(|peer| rule.admit(&peer).map_err(|refused| refused.to_string()).map(|()| peer));
        let taken = judged.is_ok();
        self.set(judged);
        // The peer is told by the alert access_denied.
        taken.then_some(()).ok_or(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }
}

/// Checks whoever accepts a connection.
#[derive(Debug)]
pub(crate) struct OfServer {
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) rule: Rule,
    pub(crate) found: Found,
}

impl ServerCertVerifier for OfServer {
    // The name that was dialled is an address: who has to be there is in the rule.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _dialled: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        self.found.judge(end_entity, &self.rule)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Checks whoever has dialled.
#[derive(Debug)]
pub(crate) struct OfClient {
    pub(crate) chain: Arc<dyn ClientCertVerifier>,
    pub(crate) rule: Rule,
    pub(crate) found: Found,
}

impl OfClient {
    pub(crate) fn new(
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
        rule: Rule,
        found: Found,
    ) -> Result<Self, Error> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
        let chain = chain.map_err(|error| Error::General(error.to_string()))?;
        Ok(Self { chain, rule, found })
    }
}

impl ClientCertVerifier for OfClient {
    // Not told: whoever asks without a certificate need not know whom this host trusts.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        self.found.judge(end_entity, &self.rule)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
