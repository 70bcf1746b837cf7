//! The SDK's default chain of credentials, made anew when what it keeps is of no use.
//!
//! Sources keep a token of the metadata service and the last keys that it gave, by the node's clock and whatever the services say of
//! them: after a clock that was set back, or a token that came damaged, they would be used for hours.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use aws_config::ConfigLoader;
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, Result, SharedCredentialsProvider, future};

/// The default chain; clones share it.
#[derive(Clone)]
pub(crate) struct Chain {
    make: Arc<dyn Fn() -> ConfigLoader + Send + Sync>,
    current: Arc<Mutex<Option<SharedCredentialsProvider>>>,
}

impl Chain {
    /// `make` says how the chain is set up. Nothing is read before the first request.
    pub(crate) fn new(make: impl Fn() -> ConfigLoader + Send + Sync + 'static) -> Self {
        Self { make: Arc::new(make), current: Arc::default() }
    }

    /// The next request begins with empty caches.
    pub(crate) fn forget(&self) {
        self.set(None);
    }

    fn set(&self, chain: Option<SharedCredentialsProvider>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = chain;
    }

    fn kept(&self) -> Option<SharedCredentialsProvider> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn credentials(&self) -> Result {
        let chain = match self.kept() {
            Some(chain) => chain,
            None => {
                let made = (self.make)().load().await.credentials_provider();
                let made = made.ok_or_else(|| CredentialsError::not_loaded("no source of credentials is set up"))?;
                self.set(Some(made.clone()));
                made
            }
        };
        let answer = chain.provide_credentials().await;
        if answer.is_err() {
            self.forget();
        }
        answer
    }
}

impl ProvideCredentials for Chain {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.credentials())
    }

    fn fallback_on_interrupt(&self) -> Option<Credentials> {
        self.kept()?.fallback_on_interrupt()
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Chain")
    }
}
